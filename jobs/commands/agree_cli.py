"""`rushes agree`: its options; the work is in `jobs.commands.agree`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.options import Debug, console


def agree(
    pairs: Annotated[Path, typer.Argument(metavar="PAIRS.parquet", help="Pairs with the better one's label.")],
    reward: Annotated[
        list[str] | None, typer.Option("--reward", "-r", help="Scorer, or file.py:function; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for scores.parquet and agreement.json.")] = Path(
        "agreement"
    ),
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of a reward: NAME.args.KEY=VALUE or NAME.segments.KEY=VALUE."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Ask rewards about pairs that people have judged: which one agrees with them?

    PAIRS.parquet has a row per pair: path_a and path_b (files, relative to it) or bytes_a and bytes_b (png, jpg, webp,
    mp4), label (a, b or tie), and prompt (for edits also image, their source). For each reward: how often it prefers
    what people prefer, with a 95 % interval; the same with ties; and how well the size of its differences tells how
    sure it is. Stopped or failed calls go on where they were when repeated.

    \b
    Examples:
      rushes agree pairs.parquet --reward clip_score --reward jpeg_compressibility
      rushes agree pairs.parquet -r pickscore -r my_rewards.py:score --out agreement
      rushes agree pairs.parquet -r clip_score --set clip_score.args.model=openai/clip-vit-base-patch32
    """
    from jobs.commands.agree import agreement
    from jobs.common.reward_options import reward_configs

    raise typer.Exit(agreement(pairs, rewards=reward_configs(reward or [], option or []), out=out, console=console()))
