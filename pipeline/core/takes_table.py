"""Takes as files: pictures or clips in a folder, and `takes.parquet` with a row for each.

Columns: prompt, prompt_index, seed, version, step, take, path (null where no file was written), reward (the weighted
sum), and for each reward `reward/<name>` (null where it does not apply) and, of a segmental one, `segments/<name>`
(values of the S segments), `segment_weights/<name>` [S] and `segment_frames/<name>` [S, n].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import InputError, one_line
from pipeline.core.files import atomic_write
from pipeline.core.media import write_media
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
) -> list[Path | None]:
    """Appends one row per take to the folder's table and writes the media. Returns the media paths.

    `weights` (default: all 1) make the `reward` column; `step` defaults to `version`; `keep[k]` False (or media None)
    leaves that take's media out.
    """
    import pyarrow
    import pyarrow.parquet

    folder = Path(folder)
    table = folder / TAKES_FILE
    rows = read_takes(folder) if table.exists() else []
    next_take: dict[int, int] = {}  # by prompt index
    for row in rows:
        next_take[row["prompt_index"]] = max(next_take.get(row["prompt_index"], 0), row["take"] + 1)
    files: list[Path | None] = []
    for k, prompt in enumerate(prompts):
        take = next_take.get(prompt.index, 0)
        next_take[prompt.index] = take + 1
        file = None
        if media is not None and (keep is None or keep[k]):
            file = write_media(folder / f"prompt-{prompt.index:05d}-take-{take:02d}", media, k)
        files.append(file)
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
            }
        )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({c: [row.get(c) for row in rows] for c in columns}), buffer)
    atomic_write(table, buffer.getvalue().to_pybytes())
    return files


def _score_columns(scores: Mapping[str, RewardScores], weights: Mapping[str, float], k: int) -> dict[str, Any]:
    """Take `k`'s reward and its parts. NaN is the score of a reward that does not apply."""
    applying = {name: float(score.values[k]) for name, score in scores.items() if not np.isnan(score.values[k])}
    columns: dict[str, Any] = {"reward": float(sum(weights.get(name, 1.0) * v for name, v in applying.items()))}
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
    import pyarrow
    import pyarrow.parquet

    path = Path(folder) / TAKES_FILE
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({one_line(error, 120)})") from None
