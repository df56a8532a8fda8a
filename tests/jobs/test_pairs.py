"""`rushes pairs`: tables of others become labelled pairs that are smaller, sound and used at once."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import run
from PIL import Image

from pipeline.core.labelled_pairs import check_columns, read_labelled_pairs
from pipeline.core.pair_table import PairTable
from pipeline.core.prompt_diversity import log_distances


def png(level):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def convert(capsys, *args):
    status, out, err = run(capsys, "pairs", *args)
    assert "Traceback" not in out + err and err.count("\n") <= 1
    return status, out, err


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Three ranked pictures of two prompts; one more is missing, one is no picture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "media").mkdir()
    for level in (10, 20, 30):
        (tmp_path / f"media/{level}.png").write_bytes(png(level))
    (tmp_path / "media/bad.png").write_bytes(b"nothing")
    names = ["10.png", "20.png", "30.png"]
    rows = [{"prompt": "one", "image_path": names, "rank": [1, 2, 4]},
            {"prompt": "two", "image_path": names, "rank": [1, 1, 3]},
            {"prompt": "two", "image_path": ["10.png", "gone.png"], "rank": [1, 2]},
            {"prompt": "two", "image_path": ["bad.png", "../up.png"], "rank": [1, 2]}]  # fmt: skip
    (tmp_path / "test.json").write_text(json.dumps(rows))
    return tmp_path


def test_files_below_the_table_stay_files_and_what_is_dropped_is_said(capsys, ranks):
    status, out, err = convert(capsys, "test.json", "--media", "media", "--out", "pairs.parquet")
    assert status == 0, err
    assert "test.json: hpd-v2-test" in out and "dropped 2: a file that is missing or cannot be read (first: " in out
    assert "gone.png" in out and "6 of 8 pairs of 2 prompts, 1 of them ties, written to pairs.parquet" in out
    check_columns(ranks / "pairs.parquet")
    pairs = list(read_labelled_pairs(ranks / "pairs.parquet"))
    assert [pair.label for pair in pairs] == [1, 1, 1, 0, 1, 1]
    assert (pairs[0].a, pairs[0].b, pairs[0].prompt, pairs[0].origin) == (
        "media/10.png",
        "media/20.png",
        "one",
        "test.json",
    )


def test_files_elsewhere_are_copied_into_the_table(capsys, ranks):
    status, out, _ = convert(capsys, "test.json", "--media", "media", "--out", "sub/pairs.parquet", "--no-ties")
    assert status == 0 and "10 files lie outside sub and were copied" in out and "dropped 1: a tie" in out
    pairs = list(read_labelled_pairs(ranks / "sub/pairs.parquet"))
    assert len(pairs) == 5 and pairs[0].a == png(10) and pairs[-1].b == png(30)
    status, out, _ = convert(capsys, "sub/pairs.parquet", "--out", "again.parquet", "--min-margin", "3")
    assert status == 0 and "1 of 5 pairs" in out  # margins stay with the pairs


def test_pairs_are_chosen_by_margin_and_by_unlike_prompts(capsys, ranks):
    convert(capsys, "test.json", "--media", "media", "--out", "pairs.parquet")
    status, out, _ = convert(capsys, "test.json", "--media", "media", "--top", "2", "--out", "best.parquet")
    assert status == 0 and "dropped 1: a tie" in out and "dropped 3: not among the best 2" in out
    assert [(p.a, p.b) for p in read_labelled_pairs(ranks / "best.parquet")] == [
        ("media/10.png", "media/30.png"), ("media/20.png", "media/30.png")
    ]  # fmt: skip
    (ranks / "own.py").write_text(
        "def dark(frames, prompt):\n    return -frames.mean() * (1 if prompt == 'one' else -1)\n"
    )
    assert run(capsys, "agree", "pairs.parquet", "-r", "own.py:dark")[0] == 0
    scores = ["--scores", "agreement/scores.parquet", "--min-margin", "15"]
    status, out, err = convert(capsys, "pairs.parquet", *scores, "--out", "sure.parquet")
    assert status == 0, err
    assert [(p.a, p.b) for p in read_labelled_pairs(ranks / "sure.parquet")] == [("media/10.png", "media/30.png")]
    assert "dropped 4: a margin below 15" in out  # those that the reward orders the other way among them
    swapped = {
        "path_a": ["media/30.png"] * 2,
        "path_b": ["media/10.png"] * 2,
        "label": ["b", "a"],
        "prompt": ["one"] * 2,
    }
    pq.write_table(pa.table(swapped), ranks / "swapped.parquet")
    status, out, _ = convert(capsys, "swapped.parquet", *scores, "--out", "sure.parquet")
    assert status == 0 and [pair.label for pair in read_labelled_pairs(ranks / "sure.parquet")] == [-1]
    status, _, err = convert(capsys, "pairs.parquet", *scores, "--by", "x", "--out", "y.parquet")
    assert status == 2 and "--by: found 'x'; agreement/scores.parquet holds scores of own.py:dark" in err


def test_prompts_unlike_the_others_come_first(capsys, ranks):
    prompts = [f"a red circle left of a blue square {'x' * i}" for i in range(6)] + ["an old harbour in the fog"]
    distance = log_distances(prompts)
    assert distance.argmax() == 6 and distance[6] > distance[:6].max() + 0.3
    assert log_distances(["one"]).tolist() == [0.0]
    rows = [{"prompt": prompt, "path1": "10.png", "path2": "20.png", "confidence": 0.95 - 0.01 * i}
            for i, prompt in enumerate(prompts)]  # fmt: skip
    (ranks / "v3.json").write_text(json.dumps(rows))
    for diversity, first in (("0", prompts[0]), ("5", prompts[6])):
        options = ["--media", "media", "--top", "1", "--diversity", diversity, "--out", "one.parquet"]
        assert convert(capsys, "v3.json", *options)[0] == 0
        assert [pair.prompt for pair in read_labelled_pairs(ranks / "one.parquet")] == [first]


def test_bytes_are_passed_through_a_few_rows_at_a_time(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.core.pair_table.BUFFER_BYTES", 200)
    rows = [{"jpg_0": png(i), "jpg_1": png(i + 100), "label_0": float(i % 2), "caption": f"p{i}", "user_id": i}
            for i in range(20)]  # fmt: skip
    rows[3]["jpg_1"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pick.parquet")
    status, out, err = convert(capsys, tmp_path / "pick.parquet", "--out", tmp_path / "pairs.parquet")
    assert status == 0 and "dropped 1: no picture or clip that is read" in out, err
    assert pq.ParquetFile(tmp_path / "pairs.parquet").num_row_groups > 5
    pairs = list(read_labelled_pairs(tmp_path / "pairs.parquet"))
    assert len(pairs) == 19 and (pairs[3].a, pairs[3].rater, pairs[3].label) == (png(4), "4", -1)


def test_a_conversion_that_fails_leaves_no_table(capsys, ranks):
    (ranks / "bad.json").write_text('[{"prompt": "p", "path1": "gone.png", "path2": "x.png"}]')
    status, _, err = convert(capsys, "bad.json", "--out", "pairs.parquet")
    assert status == 2 and "no pair is left to write; dropped 1: a file that is missing" in err
    assert not list(ranks.glob("*.parquet")) and not list(ranks.glob(".*.partial"))
    with pytest.raises(KeyError), PairTable(ranks / "x.parquet") as table:
        table.add("p", b"a", b"b", 7, rater=None, subset=None, origin="x", margin=None)
    assert not list(ranks.glob("*x.parquet*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give at least one FILE"),
        (["gone.json"], "gone.json: no such file"),
        (["test.json", "--out", "x.csv"], "must end in .parquet"),
        (["test.json", "--format", "hpd-v3"], "has no column 'path1', which --format hpd-v3 needs"),
        (["test.json", "--format", "hpd3"], "did you mean hpd-v3?"),
        (["test.json", "--aspect", "VQ"], "--aspect: found 'VQ'; of hpd-v2-test: it has none"),
        (["test.json", "--diversity", "1"], "--diversity: belongs to --top"),
        (["test.json", "--by", "x"], "--by: belongs to --scores"),
        (["test.json", "--scores", "gone.parquet"], "--scores gone.parquet: no such file"),
    ],
)
def test_mistakes_get_one_line(capsys, ranks, args, message):
    status, _, err = convert(capsys, *args)
    assert status == 2 and message in err


def test_the_list_names_every_format(capsys):
    status, out, _ = convert(capsys, "--list")
    assert status == 0 and "pick-a-pic" in out and "video-reward" in out and "the data set's card" in out
