"""Arguments and options that several commands share, and the console they print to. A letter means one thing in all
commands: -a address, -c checkpoint, -f follow, -o output, -p prompt, -r reward, -s set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Config keys to override, such as run.steps=20."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Ema = Annotated[
    bool,
    typer.Option("--ema/--raw", help="The EMA of the trained weights, if the run kept one, or the weights themselves."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run run.name, or the newest unfinished run of CONFIG.")
]
ResumeOrStart = Annotated[
    bool,
    typer.Option("--resume-or-start", help="Continue the run run.name if it exists, else start it: for retried jobs."),
]
Rewards = Annotated[
    list[str] | None, typer.Option("--reward", "-r", help="Scorer, or file.py:function; may be repeated.")
]
RewardOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="REWARD.KEY=VALUE", help="Option of a reward, such as clip_score.args.batch=8."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        "-a",
        help="http://HOST:8265 (the dashboard), or HOST:6379 on a machine of the cluster; default: RAY_ADDRESS, or the "
        "Ray of this machine.",
    ),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or its folder.")]
RunsFolder = Annotated[Path, typer.Option("--dir", help="Folder of this machine's runs.")]
DEFAULT_RUNS = Path("runs")


def make_console() -> Console:
    """stdout; plain text 160 columns wide when it is no terminal."""
    from rich.console import Console

    return Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160)


def say(console: Console, text: str) -> None:
    """Prints a line as it is: no markup, no highlighting, no wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
