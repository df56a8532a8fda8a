"""`rushes agree`: how well rewards agree with people's judgements of pairs, to choose a reward to trust.

The files are scored as by `rushes score` (scores.parquet in the output folder, resumable).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, RewardOptions, Rewards, make_console, say
from pipeline.core.errors import InputError, RushesError


@command(Group.REWARDS)
def agree(
    pairs: Annotated[Path, typer.Argument(metavar="PAIRS.parquet", help="Pairs labelled with the better one.")],
    reward: Rewards = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for scores.parquet and agreement.json.")] = Path(
        "agreement"
    ),
    option: RewardOptions = None,
    by: Annotated[
        str | None, typer.Option("--by", metavar="COLUMN", help="Also for each value of this column of the table.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare rewards with people's judgements of pairs.

    PAIRS.parquet has a row per pair: path_a and path_b (files, relative to it) or bytes_a and bytes_b (png, jpg, webp,
    mp4), label (a, b or tie), and prompt (for edits also image, their source); `rushes label` writes such a table. For
    each reward: how often it prefers what people prefer, with a 95 % interval; the same with ties; and how well the
    size of its differences tells how sure it is. Where the table names raters: how consistent they are.
    Run the same command again to resume after an interruption or to retry errors.

    \b
    Examples:
      rushes agree pairs.parquet --reward clip_score --reward jpeg_compressibility
      rushes agree pairs.parquet -r pickscore -r my_rewards.py:score --out agreement --by subset
      rushes agree pairs.parquet -r clip_score --set clip_score.args.model=openai/clip-vit-base-patch32
    """
    import json
    import tempfile

    from jobs.common.agreement import errors_of, print_report, summarise, summarise_subsets
    from jobs.common.judged_pairs import read_pairs
    from jobs.common.reward_configs import build_reward_configs, refuse_duplicates
    from jobs.common.score_files import read_scores, score_items
    from pipeline.core.files import atomic_write
    from pipeline.core.labelled_pairs import check_columns
    from pipeline.rewards.patience import PATIENCE_S
    from pipeline.rewards.runner import build_reward
    from pipeline.tools import preflight

    rewards, console = build_reward_configs(reward or [], option or []), make_console()
    names = [cfg.scorer for cfg in rewards]
    refuse_duplicates("agree", names)
    check_columns(pairs)
    values = _column(pairs, by) if by is not None else []
    preflight.check_writable(out, "--out")
    runners = {name: build_reward(name, cfg, PATIENCE_S) for name, cfg in zip(names, rewards, strict=True)}
    rows = read_scores(out / "scores.parquet")
    with tempfile.TemporaryDirectory(prefix="rushes-agree-") as folder:
        judged = list(read_pairs(pairs, Path(folder)))
        if not judged:
            raise InputError(f"{pairs}: holds no pairs; write one a row")
        items = list({(item.name, item.prompt): item for pair in judged for item in (pair.a, pair.b)}.values())
        score_items(items, runners, rows, out / "scores.parquet", console)
    report = summarise(judged, rows, names)
    if by is not None:
        report["by"] = {"column": by, "subsets": summarise_subsets(judged, rows, names, values)}
    atomic_write(out / "agreement.json", json.dumps(report, indent=1).encode())
    print_report(report, console)
    say(console, f"written to {out / 'agreement.json'}")
    failures = [(pair.row, error) for pair in judged for error in errors_of(pair, rows, names)]
    if failures:
        row, error = failures[0]
        count = len({row for row, _ in failures})
        raise RushesError(
            f"{count} of {len(judged)} pairs could not be scored by every reward and are left out there, the first in "
            f"row {row}: {error}; the others are in the column 'error' of {out / 'scores.parquet'}"
        )


def _column(table: Path, name: str) -> list[Any]:
    """The column's values, by row. Raises `ConfigError` with the columns."""
    from pipeline.core.errors import ConfigError
    from pipeline.core.files import did_you_mean
    from pipeline.core.parquet import columns_of, read_rows

    columns = columns_of(table, (name,))
    if name not in columns:
        raise ConfigError(
            f"--by: {table} has no column {name!r:.60}{did_you_mean(name, columns)} ({', '.join(columns)})"
        )
    return [row[name] for row in read_rows(table, (name,))]
