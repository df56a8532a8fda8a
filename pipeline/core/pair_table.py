"""Writes a table of labelled pairs a few rows at a time, so that pictures need not all be in memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.core.errors import RushesError
from pipeline.core.files import describe_os_error
from pipeline.core.labelled_pairs import LABELS

BUFFER_BYTES = 32 * 2**20
_TEXTS = ("prompt", "path_a", "path_b", "label", "rater", "subset", "origin")


class PairTable:
    """`with PairTable(path) as table: table.add(…)`: the file is there once the block has ended without an error."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.path, self.rows = path, 0
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        texts = [(name, pyarrow.string()) for name in _TEXTS]
        binaries = [(name, pyarrow.binary()) for name in ("bytes_a", "bytes_b")]
        self._schema = pyarrow.schema([*texts, *binaries, ("margin", pyarrow.float64())])
        self._buffer: list[dict[str, Any]] = []
        self._bytes = 0
        self._writer: Any = None

    def add(
        self, prompt: str, a: str | bytes, b: str | bytes, label: int, *, rater: str | None, subset: str | None,
        origin: str, margin: float | None,
    ) -> None:  # fmt: skip
        """`a`, `b`: a path relative to the table, or a file's bytes."""
        words = {value: word for word, value in LABELS.items()}
        row: dict[str, Any] = {"prompt": prompt, "label": words[label], "rater": rater, "subset": subset}
        for name, take in (("a", a), ("b", b)):
            row["bytes_" + name if isinstance(take, bytes) else "path_" + name] = take
            self._bytes += len(take)
        self._buffer.append(row | {"origin": origin, "margin": margin})
        self.rows += 1
        if self._bytes > BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        if self._buffer:
            self._writer.write_table(pyarrow.Table.from_pylist(self._buffer, schema=self._schema))
        self._buffer, self._bytes = [], 0

    def __enter__(self) -> Self:
        import pyarrow.parquet

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pyarrow.parquet.ParquetWriter(self._partial, self._schema)
        except OSError as error:
            raise RushesError(f"cannot write {describe_os_error(error, self.path)}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
            if kind is None:
                os.replace(self._partial, self.path)
        except OSError as problem:
            raise RushesError(f"cannot write {describe_os_error(problem, self.path)}") from problem
        finally:
            with contextlib.suppress(FileNotFoundError):
                self._partial.unlink()
