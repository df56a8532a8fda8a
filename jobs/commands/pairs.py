"""`rushes pairs`: preference data in other people's formats, as one table of labelled pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, make_console, say
from pipeline.core.errors import ConfigError, InputError


@command(Group.REWARDS)
def pairs(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE…", help="Tables: .parquet, .json, .jsonl or .csv.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Parquet to write.")] = Path("pairs.parquet"),
    media: Annotated[
        Path | None, typer.Option("--media", metavar="FOLDER", help="Where the files lie that rows name.")
    ] = None,
    format_name: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="Default: what the columns are known by.")
    ] = None,
    aspect: Annotated[
        str | None, typer.Option("--aspect", metavar="NAME", help="Of data with several judgements: the one to take.")
    ] = None,
    ties: Annotated[bool, typer.Option("--ties/--no-ties", help="Keep ties.")] = True,
    min_margin: Annotated[
        float | None, typer.Option("--min-margin", help="Keep pairs of at least this margin.")
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", min=1, help="Keep so many pairs, those of largest margin.")
    ] = None,
    diversity: Annotated[
        float, typer.Option("--diversity", min=0, help="With --top: weight of how unlike others a prompt is.")
    ] = 0.0,
    scores: Annotated[
        Path | None, typer.Option("--scores", metavar="FILE", help="scores.parquet of `rushes agree`: margins by it.")
    ] = None,
    by: Annotated[str | None, typer.Option("--by", metavar="REWARD", help="The reward in --scores.")] = None,
    list_formats: Annotated[bool, typer.Option("--list", help="Show the formats.")] = False,
    debug: Debug = False,
) -> None:
    """Convert preference data to labelled pairs.

    Reads Pick-a-Pic, HPDv2 and v3, ImageReward, VideoReward, VideoFeedback, MJ-Bench, D3PO's labels, takes that a run
    kept with their rewards, and labelled pairs, by their columns. Pictures may be bytes or files. What was dropped is
    counted, with the first of each kind. `rushes fit-reward`, `rushes agree` and training read the result.

    \b
    Examples:
      rushes pairs validation-*.parquet --out pairs.parquet
      rushes pairs test.json --media hpdv2/test --no-ties --out pairs.parquet
      rushes pairs pairs.parquet --scores agreement/scores.parquet --top 5000 --diversity 0.5 --out few.parquet
    """
    from jobs.common.convert_pairs import PairFilter, convert, open_formats
    from pipeline.tools import preflight

    console = make_console()
    if list_formats:
        _print_formats(console)
        return
    if not files:
        raise ConfigError("pairs: give at least one FILE (--list shows the formats)")
    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: must end in .parquet")
    if any(out.resolve() == file.resolve() for file in files):
        raise ConfigError(f"--out {out}: is one of the files to read; write another one")
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file")
    if diversity and top is None:
        raise ConfigError("--diversity: belongs to --top K; add it")
    if by is not None and scores is None:
        raise ConfigError("--by: belongs to --scores FILE; add it")
    preflight.check_writable(out.parent, "--out")
    formats = open_formats(files, format_name, aspect)
    margins = _read_margins(scores, by) if scores is not None else None
    wanted = PairFilter(ties=ties, min_margin=min_margin, top=top, diversity=diversity, scores=margins)
    done = convert(files, formats, media, wanted, out)
    for read, name in done.formats.items():
        say(console, f"{read}: {name}")
    for line in done.dropped.lines():
        say(console, line)
    if done.embedded:
        say(console, f"{done.embedded} files lie outside {out.parent} and were copied into the table")
    say(
        console,
        f"{done.written} of {done.rows} pairs of {done.prompts} prompts, {done.ties} of them ties, written to {out}",
    )


def _read_margins(path: Path, reward: str | None) -> dict[tuple[str, str], float]:
    from jobs.common.score_files import read_scores

    if not path.exists():
        raise InputError(f"--scores {path}: no such file")
    rows = read_scores(path)
    rewards = sorted({name for _, _, name in rows})
    if reward is None and len(rewards) != 1 or reward is not None and reward not in rewards:
        found = "is missing" if reward is None else f"found {reward!r:.60}"
        raise ConfigError(f"--by: {found}; {path} holds scores of {', '.join(rewards) or 'none'}")
    wanted = reward or rewards[0]
    return {
        (name, prompt): row["score"]
        for (name, prompt, each), row in rows.items()
        if each == wanted and row["error"] is None
    }


def _print_formats(console: object) -> None:
    from rich.table import Table

    from pipeline.core.pair_formats import FORMATS
    from pipeline.core.registry import first_line

    table = Table("format", "data", "columns compared with")
    for name, each in FORMATS.all().items():
        table.add_row(name, first_line(each), each.checked)
    console.print(table)  # type: ignore[attr-defined]
