"""A small table of labelled pairs, and the sections of a config that trains on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.media import encode_mp4, encode_png

PROMPTS = ("a red circle", "b blue square", "c green circle", "a blue circle")
LABELS = ("a", "b", "tie", "b")
SECTIONS: dict = {
    "source": {"name": "labelled", "largest_error": 255},
    "signal": {"name": "labels"},
    "objective": {"name": "dpo"},
    "step": {"takes": 2, "groups": 2},
}


def pictures(count: int, size: int = 16, frames: int = 1, seed: int = 0) -> list[bytes]:
    """Files of random pictures, or clips of that many frames."""
    noise = np.random.default_rng(seed).integers(256, size=(count, frames, size, size, 3), dtype=np.uint8)
    return [encode_png(each[0]) if frames == 1 else encode_mp4(each, 8.0) for each in noise]


def write_table(folder: Path, size: int = 16, frames: int = 1, **columns) -> Path:
    """A table of `PROMPTS` and `LABELS` with its files. `columns`: in the place of its own; None: left out."""
    folder.mkdir(exist_ok=True)
    names: dict[str, list[str]] = {"a": [], "b": []}
    for number, data in enumerate(pictures(2 * len(PROMPTS), size, frames)):
        side = "ab"[number % 2]
        file = folder / f"{side}{number // 2}.{'png' if frames == 1 else 'mp4'}"
        file.write_bytes(data)
        names[side].append(file.name)
    table = {"path_a": names["a"], "path_b": names["b"], "prompt": list(PROMPTS), "label": list(LABELS), **columns}
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), folder / "pairs.parquet")
    return folder / "pairs.parquet"
