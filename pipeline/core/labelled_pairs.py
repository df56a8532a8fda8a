"""Labelled pairs: which of two takes of a prompt somebody finds better. One parquet table, which `rushes label` writes
and `rushes agree` reads; it is a prompt set too (`pipeline.core.prompts`), which source `labelled` trains on.

A row is an answer. Required: `path_a` and `path_b` (files, relative to the table and in its folder or below) or
`bytes_a` and `bytes_b` (a file's bytes, or the struct of the `datasets` library), and `label` (a, b or tie: the better
one). Optional: `prompt`; `image` and `metadata`, which scorers get besides the takes; `rater` (a name), `time` (of the
answer, a timestamp or ISO 8601 text), `origin` (what the label comes from), `id` (unique in the table) and `repeat_of`
(the id of an earlier answer: the same rater was shown the same two takes again).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.core.errors import InputError
from pipeline.core.files import did_you_mean
from pipeline.core.named_files import take_file
from pipeline.core.parquet import columns_of, read_rows, write_parquet
from pipeline.core.reading import shown
from pipeline.core.types import GivenTake

LABELS = {"a": 1, "b": -1, "tie": 0}
_TEXTS = ("rater", "origin", "id", "repeat_of")
COLUMNS = ("prompt", "path_a", "path_b", "bytes_a", "bytes_b", "label", "image", "metadata", "time", *_TEXTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledPair:
    """One answer. `a`, `b`: a path relative to the table, or a file's bytes. `label`: +1 a is better, -1 b, 0 tie."""

    row: int  # in the table, from 1
    a: str | bytes
    b: str | bytes
    label: int
    prompt: str = ""
    image: Any = None
    metadata: Any = None
    rater: str | None = None
    time: datetime | None = None
    origin: str | None = None
    id: str | None = None
    repeat_of: str | None = None


def is_labelled(columns: Collection[str]) -> bool:
    """Whether a parquet table with these columns is one of labelled pairs, and not of prompts."""
    return "label" in columns and not {"path_a", "bytes_a"}.isdisjoint(columns)


def pair_rows(path: Path) -> Iterator[tuple[str, dict[str, Any], tuple[GivenTake, ...]]]:
    """(where, the columns `prompt`, `image` and `metadata`, the two takes) of each row that repeats no other. The
    better take has label 1, the other 0; of a tie both have 0.5. Bytes are kept as files beside the table. Raises
    `InputError`."""
    check_columns(path)
    for pair in read_labelled_pairs(path):
        if pair.repeat_of is not None:
            continue
        where = f"row {pair.row}"
        takes = tuple(
            GivenTake(
                path=str(take_file(path, side, f"{path}, {where}: take {name}")), label=(1 + sign * pair.label) / 2
            )
            for name, side, sign in (("a", pair.a, 1), ("b", pair.b, -1))
        )
        yield where, {"prompt": pair.prompt, "image": pair.image, "metadata": pair.metadata}, takes


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


def read_labelled_pairs(path: Path) -> Iterator[LabelledPair]:
    """The rows of the table, a few at a time. Raises `InputError` with the row."""
    answers: dict[str, tuple[str | None, frozenset]] = {}  # id -> rater and takes
    for number, row in enumerate(read_rows(path, COLUMNS), start=1):
        where = f"{path}, row {number}"
        label = shown(row["label"]).strip("'").strip().lower()
        if label not in LABELS:
            raise InputError(f"{where}: label {shown(row['label'])} is none of {', '.join(LABELS)}")
        prompt = row.get("prompt") or ""
        if not isinstance(prompt, str):
            raise InputError(f"{where}: prompt must be text, found {shown(prompt)}")
        pair = LabelledPair(
            row=number, a=_side(row, "a", where), b=_side(row, "b", where), label=LABELS[label], prompt=prompt,
            image=row.get("image"), metadata=row.get("metadata"), time=_time(row.get("time"), where),
            **{name: _text(name, row.get(name), where) for name in _TEXTS},
        )  # fmt: skip
        _check_repeat(pair, answers, where)
        yield pair


def _text(name: str, value: Any, where: str) -> str | None:
    """Numbers become text: ids and users of public data sets are often numbers."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{where}: {name} must be text, a number or empty, found {shown(value)}")


def _time(value: Any, where: str) -> datetime | None:
    if value is None or isinstance(value, datetime):
        return value
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise InputError(
            f"{where}: time must be a timestamp, ISO 8601 text or empty, found {shown(value)}; rename the column if it "
            "is something else"
        ) from None


def _side(row: dict[str, Any], side: str, where: str) -> str | bytes:
    data = row.get(f"bytes_{side}")
    if isinstance(data, dict):  # an image of the `datasets` library
        data = data.get("bytes")
    if isinstance(data, bytes):
        return data
    path = row.get(f"path_{side}")
    if not isinstance(path, str) or not path:
        column = f"bytes_{side}" if f"bytes_{side}" in row else f"path_{side}"
        expected = "bytes" if column[0] == "b" else "a path"
        raise InputError(f"{where}: {column} must be {expected}, found {shown(path)}")
    return path


def _check_repeat(pair: LabelledPair, answers: dict[str, tuple[str | None, frozenset]], where: str) -> None:
    """Ids are unique, and a repeat has an earlier answer of the same rater to the same two takes."""
    if pair.id is None and pair.repeat_of is None:
        return
    takes = frozenset(side if isinstance(side, str) else hashlib.sha256(side).digest() for side in (pair.a, pair.b))
    if pair.repeat_of is not None and answers.get(pair.repeat_of) != (pair.rater, takes):
        raise InputError(
            f"{where}: repeat_of {shown(pair.repeat_of)} is no earlier answer of the same rater to the same two takes; "
            "name its id, or leave repeat_of empty"
        )
    if pair.id is not None:
        if pair.id in answers:
            raise InputError(f"{where}: the id {shown(pair.id)} is given twice; make ids unique, or leave them out")
        answers[pair.id] = (pair.rater, takes)


def write_labelled_pairs(path: Path, pairs: Sequence[LabelledPair]) -> None:
    """Writes pairs of paths as the table, atomically. Raises `RushesError`."""
    import pyarrow

    words = {value: word for word, value in LABELS.items()}
    rows = [
        {"path_a": pair.a, "path_b": pair.b, "prompt": pair.prompt, "label": words[pair.label], "time": pair.time}
        | {name: getattr(pair, name) for name in _TEXTS}
        for pair in pairs
    ]
    text, moment = pyarrow.string(), pyarrow.timestamp("ms", tz="UTC")
    names = ("path_a", "path_b", "prompt", "label", "time", *_TEXTS)
    schema = pyarrow.schema([(name, moment if name == "time" else text) for name in names])
    write_parquet(path, pyarrow.Table.from_pylist(rows, schema=schema))
