"""Pairs of takes that people have judged, read from a parquet table for `rushes agree`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.common.score_files import Item, checked_item, item_of_row
from pipeline.core.errors import InputError
from pipeline.core.files import did_you_mean
from pipeline.core.parquet import columns_of, read_rows
from pipeline.core.reading import shown

LABELS = {"a": 1, "b": -1, "tie": 0}
COLUMNS = ("prompt", "path_a", "path_b", "bytes_a", "bytes_b", "label", "image", "metadata")
# Offset, the bytes there, and the suffix of such a file.
_MAGIC = (
    (0, b"\x89PNG", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (8, b"WEBP", ".webp"),
    (0, b"BM", ".bmp"),
    (4, b"ftyp", ".mp4"),
    (0, b"\x1aE\xdf\xa3", ".mkv"),
)


@dataclass(frozen=True)
class Pair:
    row: int  # in the table, from 1
    a: Item
    b: Item
    label: int  # +1: a is better, -1: b, 0: tie


def check_columns(path: Path) -> None:
    """Raises `InputError` naming the column, what is there and the nearest fix."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a parquet file")
    columns = columns_of(path, COLUMNS)
    kind = "bytes" if any(name.startswith("bytes_") for name in columns) else "path"
    for required in ("label", f"{kind}_a", f"{kind}_b"):
        if required not in columns:
            unused = [name for name in columns if name not in COLUMNS]
            hint = did_you_mean(required, unused).replace("did you mean", "rename").rstrip("?")
            raise InputError(
                f"{path}: has no column {required!r} (columns: {', '.join(columns) or 'none'}){hint}; expected path_a "
                "and path_b, or bytes_a and bytes_b; label (a, b or tie); and usually prompt"
            )


def read_pairs(path: Path, folder: Path) -> Iterator[Pair]:
    """The rows of the table; bytes are written to `folder`, a few rows at a time. Raises `InputError` with the row."""
    for number, row in enumerate(read_rows(path, COLUMNS), start=1):
        where = f"{path}, row {number}"
        label = shown(row["label"]).strip("'").strip().lower()
        if label not in LABELS:
            raise InputError(f"{where}: label {shown(row['label'])} is none of {', '.join(LABELS)}")
        prompt = row.get("prompt") or ""
        if not isinstance(prompt, str):
            raise InputError(f"{where}: prompt must be text, found {shown(prompt)}")
        a, b = (_item(row, side, prompt, path, folder, where) for side in "ab")
        yield Pair(number, a, b, LABELS[label])


def _item(row: dict[str, Any], side: str, prompt: str, path: Path, folder: Path, where: str) -> Item:
    data = row.get(f"bytes_{side}")
    if isinstance(data, dict):  # an image of the `datasets` library
        data = data.get("bytes")
    if isinstance(data, bytes):
        name = f"sha256:{hashlib.sha256(data).hexdigest()[:24]}"
        kind = next((suffix for at, magic, suffix in _MAGIC if data[at : at + len(magic)] == magic), ".unknown")
        file = folder / f"{name[7:]}{kind}"
        if not file.exists():
            file.write_bytes(data)
        return checked_item(name, file, prompt, row.get("metadata"), where, row.get("image"), path)
    relative_path = row.get(f"path_{side}")
    if not isinstance(relative_path, str) or not relative_path:
        column = f"bytes_{side}" if f"bytes_{side}" in row else f"path_{side}"
        expected = "bytes" if column[0] == "b" else "a path"
        raise InputError(f"{where}: {column} must be {expected}, found {shown(relative_path)}")
    return item_of_row(path, relative_path, prompt, row, where)
