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
    publish: Annotated[
        Path | None,
        typer.Option("--publish", metavar="FOLDER", help="Also write a folder that any static host serves."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a run's report.html: curves, diagnostics, takes.

    Shows takes of the same prompts and seeds before and after training. The file needs no network.

    \b
    Examples:
      rushes report runs/try
      rushes report runs/try --publish site
    """
    from pipeline.runs.remote_sync import local_run
    from pipeline.tools.report.report import build_report

    report, console = build_report(local_run(run)), make_console()
    say(console, str(report))
    if publish is not None:
        from pipeline.tools.report_site import publish as publish_report

        say(
            console,
            f"{publish_report(report, publish)}; serve that folder, such as: python -m http.server -d {publish}",
        )
