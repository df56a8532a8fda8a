"""`rushes score`: scores image and video files with any rewards, to a parquet table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, RewardOptions, Rewards, make_console, say
from pipeline.core.errors import ConfigError, RushesError


@command(Group.REWARDS)
def score(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="PATH", help="A folder, a file, or a parquet with a column 'path'."),
    ] = None,
    reward: Rewards = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Parquet to write; scores it holds are kept.")] = Path(
        "scores.parquet"
    ),
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt of all files.")] = None,
    option: RewardOptions = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the scorers and exit.")] = False,
    debug: Debug = False,
) -> None:
    """Score images and videos with any rewards.

    Writes one row per file and reward: path, prompt, reward, score, error. A file that cannot be read is a row with an
    error, and the exit status is 1. Run the same command again to resume after an interruption or to retry errors.
    Prompts come from --prompt, from the parquet's column 'prompt' (also a folder's takes.parquet), or from NAME.txt
    beside each file; the source image of an edit comes from the column 'image'.

    \b
    Examples:
      rushes score --list
      rushes score my_videos/ --reward jpeg_compressibility --out scores.parquet
      rushes score generated/ -r scene -r my_rewards.py:score
      rushes score clip.mp4 -r jpeg_compressibility --set jpeg_compressibility.segments.count=8
    """
    if list_:
        _print_scorers()
        return
    if path is None:
        raise ConfigError(
            "score: give a folder, a file or a parquet to score, such as: rushes score generated/ -r scene"
        )
    from jobs.common.reward_configs import build_reward_configs, refuse_duplicates
    from jobs.common.score_files import find_items, print_scores, read_scores, score_items
    from pipeline.core.media import left_out
    from pipeline.rewards.patience import PATIENCE_S
    from pipeline.rewards.runner import build_reward
    from pipeline.tools import preflight

    rewards, console = build_reward_configs(reward or [], option or []), make_console()
    names = [cfg.scorer for cfg in rewards]
    refuse_duplicates("score", names)
    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: must end in .parquet")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; give a file such as {out / 'scores.parquet'}")
    items = find_items(path, prompt)
    files, current = {item.name for item in items}, {(item.name, item.prompt) for item in items}
    # Scores of the same file under another prompt are out of date.
    rows = {key: row for key, row in read_scores(out).items() if key[0] not in files or key[:2] in current}
    preflight.check_writable(out.parent, "--out")
    runners = {name: build_reward(name, cfg, PATIENCE_S) for name, cfg in zip(names, rewards, strict=True)}
    skipped = score_items(items, runners, rows, out, console)

    scored = [rows[item.name, item.prompt, name] for item in items for name in names]
    failed = [row for row in scored if row["error"] is not None]
    print_scores(scored, names, console)
    if path.is_dir() and (others := left_out(path)):
        say(console, f"left out: {others} (of {path}, files of other kinds)")
    if skipped:
        say(console, f"{skipped} files had all their scores already")
    say(console, f"written to {out}")
    if failed:
        raise RushesError(
            f"{len(failed)} of {len(scored)} scores failed, the first: {failed[0]['error']}; "
            f"the others are in the column 'error' of {out}; fix the files and run the same command again"
        )


def _print_scorers() -> None:
    from rich.table import Table

    from pipeline.rewards.registry import list_scorers

    console, table = make_console(), Table("scorer", "reads", "tested with", "what it is")
    for row in list_scorers():
        table.add_row(row.name, row.reads, row.tested_with, row.description)
    console.print(table)
    say(console, "or your own: file.py:function (see docs/rewards.md)")
