"""The table of labelled pairs: what is written comes back, other people's tables are read, mistakes get a line."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import InputError
from pipeline.core.labelled_pairs import LabelledPair, check_columns, read_labelled_pairs, write_labelled_pairs

NOON = datetime(2026, 1, 2, 12, 0, 1, 5000, tzinfo=UTC)


def test_what_is_written_comes_back(tmp_path):
    common = {"prompt": "a cat", "rater": "ada", "time": NOON, "origin": "test"}
    pairs = [
        LabelledPair(row=1, a="x.png", b="sub/y.png", label=-1, id="1", **common),
        LabelledPair(row=2, a="sub/y.png", b="x.png", label=0, id="2", repeat_of="1", **common),
        LabelledPair(row=3, a="x.png", b="z.png", label=1),
    ]
    table = tmp_path / "pairs.parquet"
    write_labelled_pairs(table, pairs)
    check_columns(table)
    assert list(read_labelled_pairs(table)) == pairs


def test_ids_may_be_numbers_and_times_text(tmp_path):
    columns = {"bytes_a": [b"x"], "bytes_b": [{"bytes": b"y", "path": None}], "label": ["A"], "id": [7], "rater": [12]}
    pq.write_table(pa.table(columns | {"time": ["2026-01-02T12:00:01.005Z"]}), tmp_path / "p.parquet")
    (pair,) = read_labelled_pairs(tmp_path / "p.parquet")
    assert (pair.a, pair.b, pair.label, pair.id, pair.rater, pair.time) == (b"x", b"y", 1, "7", "12", NOON)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"repeat_of": [None, "3"]}, "row 2: repeat_of '3' is no earlier answer"),
        ({"repeat_of": ["2", None]}, "row 1: repeat_of '2' is no earlier answer"),
        ({"repeat_of": [None, "1"], "rater": ["ada", "bob"]}, "of the same rater"),
        ({"repeat_of": [None, "1"], "path_b": ["y", "z"]}, "to the same two takes"),
        ({"id": ["1", "1"]}, "row 2: the id '1' is given twice"),
        ({"time": ["noon", None]}, "row 1: time must be a timestamp"),
        ({"rater": [1.5, 2.5]}, "row 1: rater must be text"),
    ],
)
def test_mistakes_get_one_line_with_the_row(tmp_path, changed, message):
    columns = {"path_a": ["x", "x"], "path_b": ["y", "y"], "label": ["a", "b"], "id": ["1", "2"], "rater": ["ada"] * 2}
    pq.write_table(pa.table(columns | changed), tmp_path / "p.parquet")
    with pytest.raises(InputError) as caught:
        list(read_labelled_pairs(tmp_path / "p.parquet"))
    assert message in str(caught.value) and "\n" not in str(caught.value)
