"""Labelled pairs as files to score, for `rushes agree`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.common.rater_statistics import RaterAnswer
from jobs.common.score_files import Item, checked_item, item_of_row
from pipeline.core.labelled_pairs import LabelledPair, read_labelled_pairs
from pipeline.core.named_files import media_suffix


@dataclass(frozen=True)
class Pair:
    row: int  # in the table, from 1
    a: Item
    b: Item
    label: int  # +1: a is better, -1: b, 0: tie
    answer: RaterAnswer | None = None  # who says so, where the table tells


def read_pairs(path: Path, folder: Path) -> Iterator[Pair]:
    """The rows of the table; bytes are written to `folder`, a few rows at a time. Raises `InputError` with the row."""
    for pair in read_labelled_pairs(path):
        a, b = (_item(pair, side, path, folder) for side in (pair.a, pair.b))
        answer = None
        if pair.rater is not None:
            answer = RaterAnswer(pair.rater, pair.prompt, a.name, b.name, pair.label, pair.id, pair.repeat_of)
        yield Pair(pair.row, a, b, pair.label, answer)


def _item(pair: LabelledPair, side: str | bytes, path: Path, folder: Path) -> Item:
    where = f"{path}, row {pair.row}"
    if isinstance(side, str):
        return item_of_row(path, side, pair.prompt, {"image": pair.image, "metadata": pair.metadata}, where)
    name = f"sha256:{hashlib.sha256(side).hexdigest()[:24]}"
    file = folder / f"{name[7:]}{media_suffix(side)}"
    if not file.exists():
        file.write_bytes(side)
    return checked_item(name, file, pair.prompt, pair.metadata, where, pair.image, path)
