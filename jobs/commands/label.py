"""`rushes label`: people compare takes of a run in a browser, and their answers become labelled pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, make_console, say
from pipeline.core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from jobs.common.label_answers import Answer, AnswerFile
    from jobs.common.label_takes import Take, TakePair

MAX_LINES = 20  # of takes that cannot be used


@command(Group.REWARDS)
def label(
    folder: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A run's folder, or one with takes or media.")],
    rater: Annotated[
        list[str] | None, typer.Option("--rater", help="Print a link for this person; may be repeated.")
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", min=1, max=100_000, help="Pairs to compare.")] = 100,
    repeats: Annotated[
        float, typer.Option("--repeats", min=0, max=1, help="Share of the pairs that each rater is shown again.")
    ] = 0.1,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Parquet to write; default: labels.parquet in the folder."),
    ] = None,
    export: Annotated[
        bool, typer.Option("--export", help="Write the parquet of the answers so far, and serve nothing.")
    ] = False,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 to be reached from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8910,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Name by which browsers may call the server; repeatable."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Let people compare takes in a browser.

    Shows two takes of a prompt side by side, in an order that is drawn and hidden. Keys: left and right (that one is
    better), space (tie), down (skip), U (undo). Each answer is on the disk, in FILE with the suffix .jsonl, before the
    next pair is shown: run the same command again to go on. Ctrl-C writes FILE and prints how consistent the raters
    are.

    \b
    Examples:
      rushes label runs/try
      rushes label generated --rater ada --rater bob --pairs 200
      rushes label runs/try --export
      rushes agree runs/try/labels.parquet --reward pickscore
    """
    import os

    from jobs.common.label_answers import AnswerFile, read_answers
    from jobs.common.label_session import rater_name
    from jobs.common.label_takes import draw_pairs, find_takes

    console = make_console()
    out = folder / "labels.parquet" if out is None else out
    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: must end in .parquet")
    inside = [path(folder) for path in (os.path.abspath, os.path.realpath)]
    base = [path(out.parent) for path in (os.path.abspath, os.path.realpath)]
    if not all(Path(inner).is_relative_to(outer) for inner, outer in zip(inside, base, strict=True)):
        raise ConfigError(
            f"--out {out}: must lie in {folder} or a folder above it: the table names takes relative to itself"
        )
    raters, log = [rater_name(name) for name in rater or []], out.with_suffix(".jsonl")
    if export:
        if not log.exists():
            raise InputError(f"{log}: there are no answers to export; run: rushes label {folder}")
        _export(read_answers(log)[0], out, folder, console)
        return
    takes, problems = find_takes(folder, out.parent)
    for problem in problems[:MAX_LINES]:
        say(console, f"left out: {problem}")
    if len(problems) > MAX_LINES:
        say(console, f"left out: {len(problems) - MAX_LINES} more takes")
    if not draw_pairs(takes, 1):
        raise InputError(f"{folder}: has no two takes of one prompt among its {len(takes)}; generate more per prompt")
    file = AnswerFile(log)
    try:
        if file.dropped:
            say(console, f"{log}: dropped the last line, {file.dropped} bytes that a crash had cut off")
        chosen = draw_pairs(takes, pairs, _answered(file.answers, takes))
        prompts = len({pair.a.prompt for pair in chosen})
        say(console, f"{len(chosen)} pairs of {prompts} prompts from {len(takes)} takes; answers go to {log}")
        answers = _serve(chosen, file, repeats, folder, raters, host, port, allow_host or [], console)
    finally:
        file.close()
    if any(answer.answer != "skip" for answer in answers):
        _export(answers, out, folder, console)
    else:
        say(console, "no pair is judged yet; the same command goes on")


def _serve(
    pairs: list[TakePair], file: AnswerFile, repeats: float, folder: Path, raters: list[str], host: str, port: int,
    allow_hosts: list[str], console: Console,
) -> list[Answer]:  # fmt: skip
    """All answers, once the server was told to end."""
    import asyncio
    from urllib.parse import quote

    from jobs.common.http_server import allowed_hosts
    from jobs.common.label_answers import session_token
    from jobs.common.label_service import LabelService, serve
    from jobs.common.label_session import LabelSession

    token = session_token(file.path)
    session = LabelSession(pairs, file, repeats, token)
    service = LabelService(session, folder, token, lambda line: say(console, line), allowed_hosts(host, allow_hosts))

    def links(url: str) -> None:
        for name in raters:
            say(console, f"{name}: {url}?rater={quote(name)}")
        say(console, f"open {url} (Ctrl-C ends it)" if not raters else f"others: {url} (Ctrl-C ends it)")

    asyncio.run(serve(service, token, host, port, links))
    return session.answers


def _answered(answers: list[Answer], takes: list[Take]) -> list[TakePair]:
    """The pairs that have answers, as far as their takes are there."""
    from dataclasses import replace

    from jobs.common.label_takes import TakePair

    by_name = {take.name: take for take in takes}
    pairs = [
        TakePair(replace(by_name[one.path_a], prompt=one.prompt), replace(by_name[one.path_b], prompt=one.prompt))
        for one in answers
        if one.path_a in by_name and one.path_b in by_name
    ]
    return list({pair.key: pair for pair in pairs}.values())


def _export(answers: list[Answer], out: Path, folder: Path, console: Console) -> None:
    from jobs.common.label_answers import labelled_pairs, rater_answers
    from jobs.common.rater_statistics import print_raters, summarise_raters
    from pipeline.core.labelled_pairs import write_labelled_pairs
    from pipeline.core.safe_paths import not_regular

    rows = labelled_pairs(answers, origin=f"rushes label {folder.resolve().name}")
    if not rows:
        raise InputError(f"{out}: there is no answer but skips; nothing to write")
    write_labelled_pairs(out, rows)
    print_raters(summarise_raters(rater_answers(rows)), console)
    skips = len(answers) - len(rows)
    say(console, f"{len(rows)} answers written to {out}" + (f"; {skips} skipped" if skips else ""))
    for name in sorted({str(side) for row in rows for side in (row.a, row.b)}):
        if problem := not_regular(out.parent / name):
            say(console, f"warning: {out.parent / name} {problem}; its answers are kept in the table")
