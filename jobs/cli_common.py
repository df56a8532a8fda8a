"""Arguments and options that several commands share, and where they print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ConfigError

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Config keys to override, such as run.steps=20."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Ema = Annotated[
    bool,
    typer.Option("--ema/--raw", help="The EMA of the trained weights (if kept), or the weights themselves."),
]


def console():
    """stdout; plain text when it is no terminal."""
    from rich.console import Console

    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160)


def reward_configs(names: list[str], options: list[str]):
    """RewardConfig of each --reward with its --set options; the config's own validation and wording."""
    from pipeline.config_io import apply_overrides, validate

    entries: dict = {name: {"scorer": name} for name in dict.fromkeys(names)}
    by_length = sorted(entries, key=len, reverse=True)  # names of own files hold dots themselves
    for text in options:
        name = next((n for n in by_length if text.startswith(f"{n}.")), None)
        if name is None:
            raise ConfigError(
                f"--set {text}: must start with a reward given by --reward ({', '.join(entries) or 'none'}) and a dot"
            )
        apply_overrides(entries[name], [text.removeprefix(f"{name}.")])
    if not entries:
        return []
    plain = {"generator": {"pretrained": "-"}, "prompts": {"train": "-"}, "rewards": entries}
    found = validate(plain, "--set").rewards
    return [found[name] for name in names]
