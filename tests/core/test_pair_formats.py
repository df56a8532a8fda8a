"""Preference data in the forms in which others publish it: told apart by columns, turned into pairs."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import InputError
from pipeline.core.pair_formats import FORMATS
from pipeline.core.pair_formats.base import JudgedPair, LeftOut
from pipeline.core.pair_formats.files import columns_in, format_of, rows_of

RATINGS = ("visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment", "factual consistency")


def read(path, aspect=None):
    """(format's name, [(a, b, label, margin)], reasons of what was left out)."""
    found = format_of(path, columns_in(path))
    results = list(found(aspect=aspect).pairs(rows_of(path, found.required | found.optional)))
    pairs = [(each.a, each.b, each.label, each.margin) for each in results if isinstance(each, JudgedPair)]
    return found.name, pairs, [each.reason for each in results if isinstance(each, LeftOut)]


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_json(path, value):
    path.write_text(json.dumps(value))
    return path


def pick(label, **more):
    row = {"jpg_0": b"0", "jpg_1": b"1", "label_0": label, "label_1": 1 - label, "caption": "p", "user_id": 7}
    return {**row, "has_label": True, "ranking_id": 3, **more}


def test_pick_a_pic(tmp_path):
    rows = [pick(1.0), pick(0.0), pick(0.5), pick(0.0, has_label=False), pick(1.0, caption=None), pick(1.0, jpg_0=None)]
    path = parquet(tmp_path / "x.parquet", rows)
    name, pairs, left = read(path)
    assert (name, [pair[2] for pair in pairs]) == ("pick-a-pic", [1, -1, 0]) and pairs[0][:2] == (b"0", b"1")
    assert left == ["no label", "no prompt", "no picture"]
    found = next(FORMATS.get(name)().pairs(rows_of(path, FORMATS.get(name).required | {"user_id"})))
    assert (found.rater, found.where) == ("7", f"{path}, row 1")


def test_hpd_v2(tmp_path):
    train = [{"prompt": "p", "file_path": ["x", "y"], "human_preference": [0, 1]},
             {"prompt": "p", "file_path": ["x", "y"], "human_preference": [1]}]  # fmt: skip
    assert read(as_json(tmp_path / "train.json", train)) == (
        "hpd-v2-train", [("x", "y", -1, 1.0)], ["not as many scores as takes, or fewer than two"]
    )  # fmt: skip
    test = [{"prompt": "p", "image_path": ["x", "y", "z"], "rank": [2, 0, 2], "raw_annotations": [{"rank": [1]}]},
            {"prompt": "p", "image_path": "x", "rank": 1}]  # fmt: skip
    name, pairs, left = read(as_json(tmp_path / "test.json", test))
    assert name == "hpd-v2-test" and left == ["no list of pictures and ranks"]
    assert pairs == [("x", "y", -1, 2.0), ("x", "z", 0, 0.0), ("y", "z", 1, 2.0)]


def test_hpd_v3(tmp_path):
    rows = [{"prompt": "p", "path1": "x", "path2": "y", "confidence": 0.9, "choice_dist": [9, 1], "model1": "m"},
            {"prompt": "p", "path1": "x", "path2": "x", "confidence": None}]  # fmt: skip
    assert read(as_json(tmp_path / "v3.json", rows)) == ("hpd-v3", [("x", "y", 1, 0.9)], ["twice the same take"])


def test_image_reward_in_rows_and_in_groups(tmp_path):
    common = {"prompt": "p", "image_amount_in_total": 3}
    rows = [{"prompt_id": "1", "image": {"bytes": None, "path": name}, "rank": rank, **common}
            for name, rank in (("x", 2), ("y", 1), ("z", 2))]  # fmt: skip
    rows.append({"prompt_id": "2", "image": {"bytes": b"w", "path": "w"}, "rank": 1, **common})
    name, pairs, left = read(parquet(tmp_path / "rows.parquet", rows))
    assert name == "image-reward" and pairs == [("x", "y", -1, 1.0), ("x", "z", 0, 0.0), ("y", "z", 1, 1.0)]
    assert left == ["not as many scores as takes, or fewer than two"]
    grouped = [{"prompt_id": "1", "image_path": ["x", "y"], "rank": [1, 5], **common}]
    assert read(as_json(tmp_path / "groups.json", grouped))[1] == [("x", "y", 1, 4.0)]


def test_videos_by_aspect(tmp_path):
    path = tmp_path / "bench.csv"
    path.write_text(
        'path_A,path_B,A_model,prompt,VQ,MQ,TA,Overall\na.mp4,b.mp4,m,"one, two",A,same,B,B\na.mp4,b.mp4,m,p,A,A,A,\n'
    )
    assert read(path) == ("video-reward", [("a.mp4", "b.mp4", -1, None)], ["no label"])
    assert [pair[2] for pair in read(path, "VQ")[1]] == [1, 1] and [pair[2] for pair in read(path, "MQ")[1]] == [0, 1]
    rows = [
        {
            "id": f"v{i}",
            "text prompt": prompt,
            **dict.fromkeys(RATINGS, rating),
            "visual quality": 4,
            "images": ["f.jpg"],
        }
        for i, (prompt, rating) in enumerate((("p", 1), ("p", 3), ("q", 2)))
    ]
    feedback = parquet(tmp_path / "feedback.parquet", rows)
    name, pairs, left = read(feedback)
    assert (name, left) == ("video-feedback", ["one clip of its prompt"])
    assert pairs == [("v0.mp4", "v1.mp4", -1, pytest.approx(1.6))]
    assert read(feedback, "visual quality")[1] == [("v0.mp4", "v1.mp4", 0, 0.0)]


def test_d3po_counts_pictures_through(tmp_path):
    as_json(tmp_path / "prompt.json", ["p", "q"])
    path = as_json(tmp_path / "labels.json", [[1, -1], [0, 0, 1]])
    name, pairs, _ = read(path)
    assert name == "d3po" and pairs[0] == ("images/00000.png", "images/00001.png", 1, 2.0)
    as_json(path, [[1, -1, 0], [0, 1, 0]])
    assert read(path)[1][3] == ("images/00003.png", "images/00004.png", -1, 1.0)
    as_json(tmp_path / "prompt.json", ["p"])
    with pytest.raises(InputError, match="labels of 2 prompts, and prompt.json beside it 1"):
        read(path)


def test_mj_bench_keeps_the_subset(tmp_path):
    rows = [{"image0": {"bytes": b"0", "path": None}, "image1": {"bytes": b"1", "path": None}, "label": label,
             "caption": "p", "category": "safety", "subcategory": "crime"} for label in (0, 1, 2)]  # fmt: skip
    path = parquet(tmp_path / "mj.parquet", rows)
    name, pairs, left = read(path)
    assert (name, [pair[2] for pair in pairs], left) == ("mj-bench", [1, -1], ["no label"])
    found = FORMATS.get(name)
    assert next(found().pairs(rows_of(path, found.required | found.optional))).subset == "safety/crime"


def test_takes_of_a_prompt_are_compared_wherever_they_stand(tmp_path):
    rows = [{"path": path, "prompt": prompt, "prompt_index": index, "seed": 0, "reward": reward}
            for path, prompt, index, reward in (("a", "p", 0, 0.1), ("b", "q", 1, 0.5), ("c", "p", 0, 0.4),
                                                (None, "p", 0, 0.9), ("d", "q", 1, None))]  # fmt: skip
    assert read(parquet(tmp_path / "takes.parquet", rows)) == (
        "takes", [("a", "c", -1, pytest.approx(0.3))], ["no media or no reward was kept"] * 2 +
        ["not as many scores as takes, or fewer than two"],
    )  # fmt: skip


def test_the_labelled_form_leaves_repeats_out(tmp_path):
    rows = [{"path_a": "x", "path_b": "y", "label": "B", "prompt": "p", "repeat_of": None},
            {"path_a": "y", "path_b": "x", "label": "a", "prompt": "p", "repeat_of": "1"},
            {"path_a": "x", "path_b": "y", "label": "?", "prompt": "p", "repeat_of": None}]  # fmt: skip
    path = parquet(tmp_path / "l.parquet", rows)
    assert read(path) == ("labelled", [("x", "y", -1, None)], ["a repeat of an earlier answer", "no label"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '[{"prompt": "p", "pic": 1}]', "has the columns prompt, pic, which are those of no known format"),
        ("x.json", "{}", "expected a JSON list, found a mapping"),
        ("x.json", "[]", "holds no rows"),
        ("x.json", '[{"a": 1}, 3]', "row 2: expected an object, found 3"),
        ("x.jsonl", '{"a": 1}\n{"a', "line 2: is not valid JSON"),
        ("x.txt", "a", "expected a file that ends in .parquet, .json, .jsonl, .csv"),
    ],
)
def test_files_of_no_format_get_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        list(rows_of(tmp_path / name, frozenset()))
        read(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_each_format_has_columns_of_its_own():
    """No file can be taken for two formats that ask for as many columns."""
    formats = FORMATS.all()
    for name, each in formats.items():
        assert format_of("x", list(each.required)) is each, name
