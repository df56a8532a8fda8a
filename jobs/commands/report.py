"""`rushes report`: the HTML report of a run, also of one that is still running."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, make_console, say
from pipeline.core.errors import ConfigError


@command(Group.LOOK)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…", help="The run's folder; the run need not have ended. Several: one page for all."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Of several runs: the page to write; default: comparison.html."),
    ] = None,
    publish: Annotated[
        Path | None,
        typer.Option("--publish", metavar="FOLDER", help="Also write a folder that any static host serves."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Write it anew (looking every 30 s) until the run ends.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a run's report.html: curves, diagnostics, takes.

    Shows takes of the same prompts and seeds before and after training. The file needs no network. Several runs get one
    page side by side: held-out rewards against the first run's, verdicts, config differences, takes in step.

    \b
    Examples:
      rushes report runs/try
      rushes report runs/try --publish site
      rushes report runs/try --follow
      rushes report runs/grpo runs/nft -o grpo-nft.html
    """
    from pipeline.runs.remote_sync import local_run
    from pipeline.tools.report.follow import follow as follow_report
    from pipeline.tools.report.report import build_report
    from pipeline.tools.report_site import publish as publish_report

    console = make_console()
    if len(runs) > 1:
        if follow:
            raise ConfigError("--follow: is for one run; write the page of several again to renew it")
        _compare(runs, out, publish)
        return
    if out is not None:
        raise ConfigError("--out: is for several runs; the report of one is report.html in its folder")
    shown: list[Path] = []

    def written(report: Path) -> None:
        page = report if publish is None else publish_report(report, publish)
        if not shown:  # of a report that is followed: once
            say(console, str(report))
            if publish is not None:
                say(console, f"{page}; serve that folder, such as: python -m http.server -d {publish}")
        shown.append(report)

    if follow:
        follow_report(lambda: local_run(runs[0]), written)
    else:
        written(build_report(local_run(runs[0])))


def _compare(runs: list[Path], out: Path | None, publish: Path | None) -> None:
    from pipeline.runs.remote_sync import local_run
    from pipeline.tools.preflight import check_writable
    from pipeline.tools.report.compare import build_comparison

    if publish is not None:
        raise ConfigError("--publish: is for one run; the page of several is one file that needs nothing beside it")
    out = out or Path("comparison.html")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; give a file, such as {out / 'comparison.html'}")
    check_writable(out.parent, "--out")
    say(make_console(), str(build_comparison([local_run(run) for run in runs], out)))
