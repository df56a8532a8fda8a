"""What a search did, beside its takes: `search.parquet` with a row for every state of a particle, and the page of it.

Columns: prompt, prompt_index, take_seed (of the plain take, as in takes.parquet), node, parent (its node; -1: none),
level, seed (of the noise drawn last), score (of what the model predicts there, or of the finished take; null: not
scored), calls (denoiser calls of the search so far), kept (the take that was found, and its ancestors), picture (PNG of
what was scored, of the first takes only).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.media import encode_png, shrink
from pipeline.core.parquet import read_rows, write_parquet
from pipeline.core.types import PromptItem
from pipeline.search.base import Found, Task

TABLE = "search.parquet"
SHOWN = 6  # takes whose pictures are kept
THUMBNAIL = 96  # pixels, longer side of a kept picture


def trace_rows(task: Task, found: Found, prompt: PromptItem) -> list[dict[str, Any]]:
    """The rows of one search."""
    kept, node = set(), found.best.node
    while node >= 0:
        kept.add(node)
        node = task.trace.nodes[node].parent
    return [
        {
            "prompt": prompt.text,
            "prompt_index": prompt.index,
            "take_seed": task.seed,
            "node": number,
            "parent": node.parent,
            "level": node.level,
            "seed": node.seed,
            "score": node.score,
            "calls": node.calls,
            "kept": number in kept,
            "picture": encode_png(shrink(node.picture, THUMBNAIL)) if node.picture is not None else None,
        }
        for number, node in enumerate(task.trace.nodes)
    ]


def append_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds the rows of searches to the folder's table; those of searches that it already has replace them."""
    import pyarrow

    new = {(row["prompt_index"], row["take_seed"]) for row in rows}
    old = [row for row in read_search(folder) if (row["prompt_index"], row["take_seed"]) not in new]
    together = [*old, *rows]
    columns = {key: [row[key] for row in together] for key in rows[0]}
    columns["score"] = pyarrow.array(columns["score"], pyarrow.float64())
    columns["picture"] = pyarrow.array(columns["picture"], pyarrow.binary())
    write_parquet(Path(folder) / TABLE, pyarrow.table(columns))


def read_search(folder: Path) -> list[dict[str, Any]]:
    """The rows of the folder's table; none where there is no table. Raises `InputError`."""
    path = Path(folder) / TABLE
    return list(read_rows(path)) if path.exists() else []
