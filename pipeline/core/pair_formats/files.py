"""The rows of a file of preference data (parquet, JSON, JSON lines, CSV), and which format it has."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import InputError
from pipeline.core.pair_formats.base import FORMATS, PairFormat, Row
from pipeline.core.parquet import columns_of, read_rows
from pipeline.core.reading import MAX_LINES, parse_json, parse_json_object, read_bytes, shown, text_lines

SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
_FIX = "copy the file again"


def format_of(path: Path, columns: list[str]) -> type[PairFormat]:
    """The format whose columns are all there, the one that asks for most. Raises `InputError` with all formats."""
    fitting = [each for each in FORMATS.all().values() if each.required <= set(columns)]
    if not fitting:
        known = "; ".join(f"{name}: {', '.join(sorted(each.required))}" for name, each in FORMATS.all().items())
        raise InputError(
            f"{path}: has the columns {', '.join(columns[:30]) or 'none'}, which are those of no known format "
            f"({known}); rename columns to path_a, path_b, label and prompt"
        )
    return max(fitting, key=lambda each: len(each.required))


def columns_in(path: Path) -> list[str]:
    """Raises `InputError`."""
    if path.suffix == ".parquet":
        return columns_of(path)
    first = next(rows_of(path, frozenset()), None)
    if first is None:
        raise InputError(f"{path}: holds no rows")
    return list(first[1])


def rows_of(path: Path, columns: frozenset[str]) -> Iterator[Row]:
    """In order. `columns`: the ones that a parquet's rows are to hold, where they are there. Raises `InputError`."""
    if path.suffix == ".parquet":
        for number, row in enumerate(read_rows(path, sorted(columns)), start=1):
            yield f"{path}, row {number}", row
    elif path.suffix == ".jsonl":
        for number, line in text_lines(path):
            if line.strip():
                yield f"{path}, line {number}", parse_json_object(line, f"{path}, line {number}", _FIX)
    elif path.suffix == ".csv":
        lines = csv.DictReader(f"{line}\n" for _, line in text_lines(path))
        try:
            for number, row in enumerate(lines, start=1):
                yield f"{path}, row {number}", {key: value for key, value in row.items() if key is not None}
        except csv.Error as error:
            raise InputError(f"{path}: is not readable as CSV ({error}); {_FIX}") from None
    elif path.suffix == ".json":
        yield from _json_rows(path)
    else:
        raise InputError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")


def _json_rows(path: Path) -> Iterator[Row]:
    """Of a list of objects; or of lists of numbers, with the prompts of prompt.json beside it."""
    rows = _json_list(path)
    if rows and all(isinstance(row, list) for row in rows):
        prompts = _json_list(path.with_name("prompt.json"))
        if len(prompts) != len(rows):
            raise InputError(f"{path}: holds labels of {len(rows)} prompts, and prompt.json beside it {len(prompts)}")
        rows = [{"labels": rows[i], "prompt": prompts[i], "row": i} for i in range(len(rows))]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: expected an object, found {shown(row)}; {_FIX}")
        yield f"{path}, row {number}", row


def _json_list(path: Path) -> list[Any]:
    value = parse_json(read_bytes(path, MAX_LINES), str(path), _FIX)
    if not isinstance(value, list):
        raise InputError(f"{path}: expected a JSON list, found {shown(value)}; {_FIX}")
    return value
