"""The commands of a cluster's user: each parses its options here and does its work in a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli_common import Debug, console
from pipeline.errors import ConfigError


def plan(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run's folder, also of one that goes on.")
    ] = None,
    rollout: Annotated[
        float | None, typer.Option("--rollout", help="Instead of RUN: seconds to draw a step's groups on one worker.")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="NAME=SECONDS", help="Seconds to score them on one server; per reward."),
    ] = None,
    learn: Annotated[float | None, typer.Option("--learn", help="Seconds of the update.")] = None,
    sync: Annotated[float, typer.Option("--sync", help="Seconds to publish the weights.")] = 0.0,
    groups: Annotated[int, typer.Option("--groups", min=1, help="Groups per step; with RUN: its own.")] = 8,
    staleness: Annotated[
        int | None, typer.Option("--staleness", min=0, help="algorithm.max_staleness; default: the run's, else 0.")
    ] = None,
    most: Annotated[int | None, typer.Option("--max", min=1, help="Rollout workers you could have.")] = None,
    worth: Annotated[
        float, typer.Option("--worth", min=0.0, max=1.0, help="Share of a step that one more worker must save.")
    ] = 0.05,
    debug: Debug = False,
) -> None:
    """How many rollout workers and reward servers to use, from measured step times.

    \b
    Examples:
      rushes plan runs/try
      rushes plan runs/try --staleness 1 --max 8
      rushes plan --rollout 320 --score clip=40 --learn 90 --groups 8
    """
    from jobs.sizing import from_options, from_run, show

    if run is not None and (rollout is not None or learn is not None or score):
        raise ConfigError("plan: give either a run or --rollout, --score and --learn, not both")
    times, cfg = from_run(run) if run is not None else (from_options(rollout, score or [], learn, sync, groups), None)
    if staleness is None:
        staleness = cfg.algorithm.max_staleness if cfg is not None else 0
    show(times, cfg, staleness, most, worth, console())


def add_cluster_commands(app: typer.Typer) -> None:
    for command in (plan,):
        app.command()(command)
