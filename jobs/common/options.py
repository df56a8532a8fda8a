"""Arguments and options that several commands share, and where they print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

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
