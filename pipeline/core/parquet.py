"""Parquet tables: those of others are read a few rows at a time and within a budget of decoded bytes.

A table of a kilobyte can hold gigabytes: equal values are stored once, and zeros compress a thousandfold. So the sizes
that its footer states are compared with the budget before anything is decoded, and decoded rows are counted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import InputError, one_line
from pipeline.core.files import atomic_write
from pipeline.core.reading import parse_json, shown
from pipeline.core.safe_paths import check_regular

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

MAX_DECODED = 4 * 2**30  # bytes of all rows that are read
MAX_ROWS = 20_000_000
MAX_COLUMNS = 10_000
BATCH_BYTES = 256 * 2**20  # decoded at once
BATCH_ROWS = 1024
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """An open table whose footer is sound and within the limits. Raises `InputError`."""
    import pyarrow
    import pyarrow.parquet

    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    check_regular(path)
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({one_line(error, 120)}); write it again") from None
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise InputError(f"{path}: has the column {shown(twice)} twice; rename one")
    meta = table.metadata
    if meta.num_rows > MAX_ROWS or meta.num_columns > MAX_COLUMNS:
        raise InputError(
            f"{path}: states {meta.num_rows:,} rows and {meta.num_columns:,} columns; at most {MAX_ROWS:,} and "
            f"{MAX_COLUMNS:,} are read, so split it"
        )
    return table


def write_parquet(path: Path, table: pyarrow.Table) -> None:
    """Completely or not at all. Raises `RushesError`."""
    import pyarrow
    import pyarrow.parquet

    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, buffer)
    atomic_write(path, buffer.getvalue().to_pybytes())


def columns_of(path: Path, expected: Collection[str] = ()) -> list[str]:
    """The columns of a table, without those in which pandas keeps its index. Raises `InputError`.

    `expected`: columns that are the user's, also where they were the index of the frame.
    """
    with open_parquet(path) as table:
        schema = table.schema_arrow
    notes = (schema.metadata or {}).get(b"pandas")
    try:
        index = parse_json(notes, str(path), "write it again")["index_columns"] if notes else []
        index = [name for name in index if isinstance(name, str)]
    except (InputError, KeyError, TypeError):  # notes that pandas did not write
        index = []
    return [name for name in schema.names if name in expected or not (name in index or _PANDAS_INDEX.fullmatch(name))]


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows as mappings of column to value, in order. `columns`: the ones to read; those absent are left out.

    Raises `InputError` with the row: values that cannot be decoded (text that is not UTF-8, dates beyond the year
    9999), or more than `MAX_DECODED` bytes.
    """
    import pyarrow

    with open_parquet(path) as table:
        names = table.schema_arrow.names
        chosen = [name for name in names if columns is None or name in columns]
        decoded, number = 0, 0
        try:
            for batch in table.iter_batches(_rows_at_once(path, table, chosen), columns=chosen):
                decoded += batch.nbytes
                if decoded > MAX_DECODED:
                    raise InputError(_too_large(path, decoded))
                for i in range(batch.num_rows):
                    number += 1
                    yield {name: batch.column(name)[i].as_py() for name in chosen}
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError, MemoryError) as error:
            raise InputError(
                f"{path}, row {number}: cannot be decoded ({one_line(error, 120)}); write the table again"
            ) from None


def _rows_at_once(path: Path, table: pyarrow.parquet.ParquetFile, columns: Sequence[str]) -> int:
    """So few rows that even the largest value in each of them fits `BATCH_BYTES`. Raises `InputError`."""
    total, largest = 0, 1
    for group in range(table.metadata.num_row_groups):
        row_group = table.metadata.row_group(group)
        for column in range(row_group.num_columns):
            chunk = row_group.column(column)
            if chunk.path_in_schema.split(".")[0] in columns or chunk.path_in_schema in columns:
                total += chunk.total_uncompressed_size
                largest = max(largest, chunk.total_uncompressed_size)
    if total > MAX_DECODED:
        raise InputError(_too_large(path, total))
    return max(1, min(BATCH_ROWS, BATCH_BYTES // largest))


def _too_large(path: Path, size: int) -> str:
    return (
        f"{path}: unfolds to more than {size / 2**30:.1f} GiB, and at most {MAX_DECODED / 2**30:g} GiB are read; "
        "split it, or keep media in files of their own"
    )
