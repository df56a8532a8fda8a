"""`rushes report`: the HTML report of a run, also of one that is still running."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, make_console, say


@command(Group.LOOK)
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder; the run need not have ended.")],
    debug: Debug = False,
) -> None:
    """Write a run's report.html: curves, diagnostics, takes.

    Shows takes of the same prompts and seeds before and after training. The file needs no network.

    \b
    Example:
      rushes report runs/try
    """
    from pipeline.runs.remote_sync import local_run
    from pipeline.tools.report.report import build_report

    say(make_console(), str(build_report(local_run(run))))
