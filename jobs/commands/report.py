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
    debug: Debug = False,
) -> None:
    """Write a run's report.html: curves, diagnostics, takes.

    Shows takes of the same prompts and seeds before and after training. The file needs no network. Several runs get one
    page side by side: held-out rewards against the first run's, verdicts, config differences, takes in step.

    \b
    Examples:
      rushes report runs/try
      rushes report runs/try --publish site
      rushes report runs/grpo runs/nft -o grpo-nft.html
    """
    from pipeline.runs.remote_sync import local_run
    from pipeline.tools.report.report import build_report

    console = make_console()
    if len(runs) > 1:
        _compare(runs, out, publish)
        return
    if out is not None:
        raise ConfigError("--out: is for several runs; the report of one is report.html in its folder")
    report = build_report(local_run(runs[0]))
    say(console, str(report))
    if publish is not None:
        from pipeline.tools.report_site import publish as publish_report

        say(
            console,
            f"{publish_report(report, publish)}; serve that folder, such as: python -m http.server -d {publish}",
        )


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
