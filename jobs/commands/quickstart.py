"""`rushes quickstart`: RL on a generator that ships, on two CPU cores in minutes."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, Overrides, make_console


@command(Group.RUN)
def quickstart(
    overrides: Overrides = None,
    image: Annotated[bool, typer.Option("--image", help="Text-to-image instead of text-to-video.")] = False,
    debug: Debug = False,
) -> None:
    """Train the small generator that ships.

    The same as `rushes train configs/quickstart.yaml`; the run's folder is made in ./runs.

    \b
    Examples:
      rushes quickstart
      rushes quickstart --image run.steps=5
    """
    from jobs.launch.training import run_training
    from pipeline.config.load import load_config
    from pipeline.core.shipped import shipped_root

    config = shipped_root() / "configs" / ("quickstart-image.yaml" if image else "quickstart.yaml")
    raise typer.Exit(run_training(load_config(config, overrides or []), config, debug=debug, console=make_console()))
