"""Takes as files: pictures or clips in a folder, and `takes.parquet` with a row for each.

Columns: prompt, prompt_index, seed, version, step, take, path (null where no file was written). Of takes that were
scored also reward (the weighted sum; null where no reward applies), and for each reward `reward/<name>` (null where it
does not apply) and, of a segmental one, `segments/<name>` (values of the S segments), `segment_weights/<name>` [S] and
`segment_frames/<name>` [S, n]. Of held-out takes also `guard/<name>` for each measurement of `pipeline.rewards.guards`,
and `descriptor`, the bytes that takes are compared by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import FiniteFloat

from pipeline.core.errors import InputError
from pipeline.core.media import write_media
from pipeline.core.parquet import read_rows, write_parquet
from pipeline.core.reading import shown
from pipeline.core.records import FIX, Record, Whole, check_record
from pipeline.core.types import Media, PromptItem, RewardScores

TAKES_FILE = "takes.parquet"


def save_takes(
    folder: Path,
    media: Media | None,
    prompts: Sequence[PromptItem],
    seeds: Sequence[int],
    version: int,
    scores: Mapping[str, RewardScores],
    *,
    step: int | None = None,
    weights: Mapping[str, float] | None = None,
    keep: Sequence[bool] | None = None,
    more_columns: Mapping[str, Sequence[Any]] | None = None,
    files: Sequence[Path | None] | None = None,
) -> list[Path | None]:
    """Appends one row per take to the folder's table and writes the media. Returns the media paths.

    `weights` (default: all 1) make the `reward` column; `step` defaults to `version`; `keep[k]` False (or media None)
    leaves that take's media out. `more_columns`: a value for each take (a NaN becomes null).
    `files`: the media are written already, by `write_takes`.
    """
    import pyarrow

    folder = Path(folder)
    table = folder / TAKES_FILE
    rows = read_takes(folder) if table.exists() else []
    next_take: dict[int, int] = {}  # by prompt index
    for row in rows:
        next_take[row["prompt_index"]] = max(next_take.get(row["prompt_index"], 0), row["take"] + 1)
    takes = number_takes(prompts, next_take)
    if files is None:
        files = write_takes(folder, media, prompts, takes, keep)
    for k, (prompt, take, file) in enumerate(zip(prompts, takes, files, strict=True)):
        rows.append(
            {
                "prompt": prompt.text,
                "prompt_index": prompt.index,
                "seed": int(seeds[k]),
                "version": int(version),
                "step": int(version if step is None else step),
                "take": take,
                "path": file.name if file else None,
                **_score_columns(scores, weights or {}, k),
                **{
                    name: None if values[k] != values[k] else values[k] for name, values in (more_columns or {}).items()
                },
            }
        )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_parquet(table, pyarrow.table({c: [row.get(c) for row in rows] for c in columns}))
    return list(files)


def number_takes(prompts: Sequence[PromptItem], next_take: dict[int, int]) -> list[int]:
    """The number of each take among its prompt's, counted on from `next_take` (by prompt index), which is updated."""
    numbers = []
    for prompt in prompts:
        numbers.append(next_take.get(prompt.index, 0))
        next_take[prompt.index] = numbers[-1] + 1
    return numbers


def write_takes(
    folder: Path,
    media: Media | None,
    prompts: Sequence[PromptItem],
    takes: Sequence[int],
    keep: Sequence[bool] | None = None,
) -> list[Path | None]:
    """Writes the media of takes, by prompt and number. Returns their paths; None for those that are not kept."""
    chosen = [media is not None and (keep is None or keep[k]) for k in range(len(prompts))]
    stems = [f"prompt-{prompt.index:05d}-take-{take:02d}" for prompt, take in zip(prompts, takes, strict=True)]
    return [
        write_media(Path(folder) / stem, media, k) if media is not None and chosen[k] else None
        for k, stem in enumerate(stems)
    ]


def _score_columns(scores: Mapping[str, RewardScores], weights: Mapping[str, float], k: int) -> dict[str, Any]:
    """Take `k`'s reward and its parts. NaN is the score of a reward that does not apply."""
    applying = {name: float(score.values[k]) for name, score in scores.items() if not np.isnan(score.values[k])}
    columns: dict[str, Any] = {}
    if scores:
        weighted = [weights.get(name, 1.0) * value for name, value in applying.items() if weights.get(name, 1.0)]
        columns["reward"] = float(sum(weighted)) if weighted else None
    for name, score in scores.items():
        columns[f"reward/{name}"] = applying.get(name)
        values, shares, frames = score.segment_values, score.segment_weights, score.segment_frames
        if name in applying and values is not None and shares is not None and frames is not None:
            columns[f"segments/{name}"] = [float(v) for v in values[k]]
            columns[f"segment_weights/{name}"] = [float(v) for v in (shares if shares.ndim == 1 else shares[k])]
            columns[f"segment_frames/{name}"] = [[int(i) for i in segment] for segment in frames]
    return columns


def read_takes(folder: Path) -> list[dict[str, Any]]:
    """Rows of the folder's table. Raises `InputError`."""
    path = Path(folder) / TAKES_FILE
    rows = list(read_rows(path))
    for number, row in enumerate(rows, start=1):
        _check_take(row, f"{path}, row {number}")
    return rows


class TakeRecord(Record):
    """A row of takes.parquet; the columns of each reward are `reward/<name>` and, of a segmental one, `segments/`,
    `segment_weights/` and `segment_frames/<name>`."""

    prompt: str
    prompt_index: Whole
    seed: int
    reward: FiniteFloat | None = None
    take: Whole = 0
    path: str | None = None
    descriptor: bytes | None = None


def _check_take(row: dict[str, Any], where: str) -> None:
    """As `check_record`, also of the columns that each reward adds."""
    check_record(TakeRecord, row, where)
    for column, value in row.items():
        kind, slash, name = column.partition("/")
        if not slash or value is None:
            continue
        if kind in ("reward", "guard") and not _is_number(value):
            raise InputError(f"{where}: {column}: found {shown(value)}, expected a number; {FIX}")
        if kind == "segments":
            if not _are_segments(value, row.get(f"segment_weights/{name}"), row.get(f"segment_frames/{name}")):
                raise InputError(f"{where}: {column}: expected a value, weight and list of frames a segment; {FIX}")


def _are_segments(values: Any, weights: Any, frames: Any) -> bool:
    """S values, S weights and S lists of frame indices."""
    lists = [part for part in (values, weights, frames) if isinstance(part, list)]
    if len(lists) < 3 or len({len(part) for part in lists}) > 1:
        return False
    picks = all(isinstance(chosen, list) and all(map(_is_index, chosen)) for chosen in frames)
    return picks and all(map(_is_number, [*values, *weights]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
