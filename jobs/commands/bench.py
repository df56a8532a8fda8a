"""`rushes bench`: the speed suite of benchmarks/speed/, which only a checkout has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug
from pipeline.core.errors import ConfigError


@command(Group.LOOK)
def bench(
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="peers, quickstart, quickstart_image, simulated or small; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON to write; its other sections are kept.")] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Rounds of run, plain loop and bare passes in turn.")
    ] = 2,
    tables: Annotated[bool, typer.Option("--tables", help="Measure nothing; only renew the tables in docs/.")] = False,
    debug: Debug = False,
) -> None:
    """Measure the speed of this checkout, on an idle machine.

    Compares the quickstarts with the bare arithmetic and with a plain single-process loop; simulates large clusters.

    \b
    Examples:
      rushes bench
      rushes bench --only simulated
    """
    try:
        from benchmarks.speed import cpu
        from benchmarks.speed import tables as table_writer
    except ImportError as error:
        raise ConfigError("bench: benchmarks/ is not here; run it in a checkout of the repository") from error

    def say(text: str) -> None:
        typer.echo(text)

    path = out or cpu.RESULTS
    if not tables:
        sections = only or list(cpu.SECTIONS)
        for name in sections:
            if name not in cpu.SECTIONS:
                raise ConfigError(f"--only {name}: expected one of {', '.join(cpu.SECTIONS)}")
        cpu.measure(sections, say, path, rounds)
        typer.echo(str(path))
    if path == cpu.RESULTS:
        typer.echo(str(table_writer.renew(path)))
