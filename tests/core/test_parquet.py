"""Parquet tables that others have written: read within a budget, or one error with the file's name."""

import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core import parquet
from pipeline.core.errors import InputError
from pipeline.core.parquet import columns_of, read_rows


def test_rows_are_read_in_order_over_batches_and_row_groups(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": list(range(5000)), "b": ["x"] * 5000}), path, row_group_size=1500)
    rows = list(read_rows(path, ["a"]))
    assert [row["a"] for row in rows] == list(range(5000)) and "b" not in rows[0]


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": ["0" * 2**20] * 64}), path, use_dictionary=False, compression="zstd")
    assert path.stat().st_size < 2**17
    monkeypatch.setattr(parquet, "MAX_DECODED", 2**25)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(InputError, match="t.parquet: unfolds to more than"):
        list(read_rows(path))


def test_equal_values_count_once_each_row(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": ["0" * 2**20] * 64}), path)  # one value in the file, 64 in memory
    monkeypatch.setattr(parquet, "MAX_DECODED", 2**25)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 2**21)
    with pytest.raises(InputError, match="t.parquet: unfolds to more than"):
        list(read_rows(path))


def test_too_many_rows(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [None] * 1000}), path)
    monkeypatch.setattr(parquet, "MAX_ROWS", 999)
    with pytest.raises(InputError, match="states 1,000 rows"):
        list(read_rows(path))


def not_utf8():
    column = pa.array([b"fine", b"caf\xe9"])
    return pa.table({"a": pa.Array.from_buffers(pa.string(), 2, column.buffers())})


@pytest.mark.parametrize(
    "table",
    [
        not_utf8(),
        pa.table({"a": pa.array([2**62], pa.timestamp("us"))}),
        pa.table({"a": pa.array([2**31 - 1], pa.int32()).cast(pa.date32())}),
    ],
    ids=["not UTF-8", "timestamp", "date"],
)
def test_values_that_cannot_be_decoded(tmp_path, table):
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match="t.parquet, row [12]: cannot be decoded"):
        list(read_rows(tmp_path / "t.parquet"))


@pytest.mark.parametrize("size", [0, 4, 100, -20])
def test_a_file_that_is_cut_off(tmp_path, size):
    pq.write_table(pa.table({"a": ["x"] * 100}), tmp_path / "whole.parquet")
    (tmp_path / "t.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:size])
    with pytest.raises(InputError, match="t.parquet: cannot be read as parquet"):
        list(read_rows(tmp_path / "t.parquet"))


def test_any_damaged_byte_is_read_or_refused(tmp_path):
    when = datetime.datetime(2026, 1, 1)
    pq.write_table(pa.table({"a": ["x", "y"], "b": [{"k": 1}, None], "c": [when, None]}), tmp_path / "whole.parquet")
    data = (tmp_path / "whole.parquet").read_bytes()
    path = tmp_path / "t.parquet"
    for i in range(0, len(data), 7):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        try:
            list(read_rows(path))
        except InputError as error:
            assert "t.parquet" in str(error)


def test_pandas_index_is_not_the_users_column(tmp_path):
    notes = {b"pandas": b'{"index_columns": ["id", "prompt"]}'}
    table = pa.table({"id": [1], "prompt": ["a"], "__index_level_0__": [3], "b": [2]}).replace_schema_metadata(notes)
    pq.write_table(table, tmp_path / "t.parquet")
    assert columns_of(tmp_path / "t.parquet", ["prompt"]) == ["prompt", "b"]
    for broken in (b"{", b"[1]", b'{"index_columns": 3}'):
        pq.write_table(table.replace_schema_metadata({b"pandas": broken}), tmp_path / "t.parquet")
        assert columns_of(tmp_path / "t.parquet") == ["id", "prompt", "b"]
