"""`rushes agree`: statistics against brute force and simulations with a known truth, and the command on real files."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import cli
from jobs.common.agreement import compared, one_reward
from pipeline.core.media import encode_mp4
from pipeline.core.preference_statistics import (
    accuracy_with_ties,
    calibration,
    fit_slope,
    fit_threshold,
    hits,
    hits_with_ties,
    proportion,
)


def made_pairs(rng, n=4000, slope=2.0, ties=0.0, per_prompt=4):
    """Differences, labels and prompts of a reward that is right about people up to its slope."""
    difference = rng.normal(size=n)
    label = np.where(rng.random(n) < 1 / (1 + np.exp(-slope * difference)), 1, -1)
    label[rng.random(n) < ties] = 0
    return difference, label, np.arange(n) // per_prompt


# ------------------------------------------------------------------------------------------------- statistics


def test_hits_count_equal_scores_half():
    assert hits(np.array([2.0, -1, 0, 3]), np.array([1, 1, -1, -1])).tolist() == [1, 0, 0.5, 0]


@pytest.mark.parametrize("truth, correlated", [(0.7, False), (0.7, True), (0.95, False)])
def test_intervals_hold_the_truth_in_95_of_100_cases(truth, correlated):
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(60), 5)
    inside = 0
    for _ in range(400):
        chance = rng.beta(truth, 1 - truth, 60)[prompts] if correlated else truth  # prompts that are easy or hard
        found = proportion((rng.random(300) < chance).astype(float), prompts)
        inside += found.low <= truth <= found.high
    assert 0.92 <= inside / 400 <= 0.99


def test_the_same_pairs_again_are_no_new_evidence():
    rng = np.random.default_rng(0)
    values = (rng.random(200) < 0.7).astype(float)
    once = proportion(values, np.arange(200))
    again = proportion(np.repeat(values, 3), np.repeat(np.arange(200), 3))
    assert again.high - again.low == pytest.approx(once.high - once.low, rel=0.02)
    fooled = proportion(np.repeat(values, 3), np.arange(600))
    assert fooled.high - fooled.low < 0.65 * (once.high - once.low)


def test_all_right_and_single_prompts_are_not_certainties():
    perfect = proportion(np.ones(40), np.repeat(np.arange(10), 4))
    assert perfect.mean == 1 and perfect.high == 1 and 0.6 < perfect.low < 0.75  # what 10 independent hits allow
    alone = proportion(np.array([1.0, 0.0, 1.0]), np.zeros(3))
    assert (alone.low, alone.high, alone.prompts) == (None, None, 1)


@pytest.mark.parametrize("seed", range(12))
def test_the_tie_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    difference = np.round(rng.normal(size=30), 1)  # with equal sizes
    label = rng.integers(-1, 2, 30)
    every = [-1.0, *np.unique(np.abs(difference))]
    best = max(hits_with_ties(difference, label, t).mean() for t in every)
    assert hits_with_ties(difference, label, fit_threshold(difference, label)).mean() == best


def test_ties_are_predicted_where_differences_are_small_and_tested_on_other_prompts():
    rng = np.random.default_rng(0)
    difference = rng.normal(size=3000)
    label = np.where(np.abs(difference) < 0.3, 0, np.sign(difference)).astype(int)
    share, threshold = accuracy_with_ties(difference, label, np.arange(3000) // 3)
    assert threshold == pytest.approx(0.3, abs=0.01) and share.mean > 0.995
    noise = rng.normal(size=300)  # a threshold that is fitted and tested on the same pairs would look better than this
    labels = rng.integers(-1, 2, 300)
    share, _ = accuracy_with_ties(noise, labels, np.arange(300))
    assert share.mean < hits_with_ties(noise, labels, fit_threshold(noise, labels)).mean()
    share, threshold = accuracy_with_ties(difference, np.sign(difference).astype(int), np.arange(3000))
    assert share.mean == 1.0 and threshold < 0  # nobody saw ties: none are predicted


@pytest.mark.parametrize("unit", [1.0, 250.0, 1e-3])
def test_the_slope_is_that_of_the_judges_in_any_unit(unit):
    difference, label, prompts = made_pairs(np.random.default_rng(0))
    assert fit_slope(difference * unit, label) * unit == pytest.approx(2.0, rel=0.08)
    found = calibration(difference * unit, label, prompts)
    truth = 1 / (1 + np.exp(-2 * np.abs(difference)))
    entropy = -(truth * np.log(truth) + (1 - truth) * np.log(1 - truth)).mean()
    assert found.log_loss == pytest.approx(entropy, abs=0.02) and found.error < 0.03
    assert sum(row["n"] for row in found.bins) == 4000
    assert [row["confidence"] for row in found.bins] == sorted(row["confidence"] for row in found.bins)


def test_calibration_tells_noise_and_misplaced_confidence():
    rng = np.random.default_rng(0)
    difference, label, prompts = made_pairs(rng)
    nothing = calibration(rng.normal(size=4000), label, prompts)
    assert nothing.log_loss == pytest.approx(math.log(2), abs=0.01) and abs(nothing.slope) < 0.1
    assert calibration(np.zeros(10), label[:10], prompts[:10]).log_loss == pytest.approx(math.log(2))
    cubed = np.sign(difference) * np.abs(difference) ** 6  # the same order, other sizes
    assert calibration(cubed, label, prompts).error > 2 * calibration(difference, label, prompts).error
    perfect = calibration(label * 1.0, label, prompts)
    assert np.isfinite(perfect.slope) and perfect.log_loss < 0.01


def test_comparisons_are_paired():
    """Rewards that agree with each other nearly always differ by little, however noisy the judges are."""
    rng = np.random.default_rng(0)
    difference, label, prompts = made_pairs(rng, n=1000, slope=1.0)
    other = difference.copy()
    other[:20] *= -1
    gap = compared(other, difference, label, prompts)
    alone = proportion(hits(difference, label), prompts)
    assert abs(gap["mean"]) < 0.02 and gap["ci95"] < 0.3 * (alone.high - alone.low)
    worse = compared(rng.normal(size=1000), difference, label, prompts)
    assert worse["mean"] + worse["ci95"] < 0


def test_failed_pairs_and_missing_kinds_of_labels():
    nan = float("nan")
    found = one_reward(np.array([1.0, nan, -1.0, 0.0]), np.array([1, 1, -1, -1]), np.arange(4))
    assert found["failed"] == 1 and found["accuracy"]["mean"] == pytest.approx(2.5 / 3) and found["equal_scores"] == 1
    assert found["with_ties"] is None
    only_ties = one_reward(np.array([1.0, 0.1]), np.zeros(2, int), np.arange(2))
    assert only_ties["accuracy"] is None and only_ties["with_ties"] is not None
    failed = one_reward(np.array([nan]), np.array([1]), np.arange(1))
    assert failed["accuracy"] is None and failed["calibration"] is None


# ------------------------------------------------------------------------------------------------- the command


def png(level):
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Rewards that like bright, dark or nothing in particular; they count their calls."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "def bright(frames, prompt):\n    open('calls', 'a').write('x')\n    return frames.mean()\n"
        "def dark(frames, prompt):\n    return -frames.mean()\n"
        "def same(frames, prompt):\n    return 1.0\n"
        "def picky(frames, prompt):\n    assert frames.mean() != 20, 'too dim'\n    return frames.mean()\n"
    )
    return tmp_path


def agree(capsys, *args):
    status = cli.main(["agree", *[str(a) for a in args]])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and err.count("\n") <= 1
    return status, out, err


LEVELS = [(10, 200), (200, 10), (30, 220), (250, 240), (100, 101), (120, 60)]
LABELS = ["b", "a", "b", "a", "tie", "a"]


def test_pairs_of_paths_are_scored_once_and_the_best_reward_comes_first(capsys, place):
    for a, b in LEVELS:
        for level in (a, b):
            (place / f"{level}.png").write_bytes(png(level))
    (place / "clip.mp4").write_bytes(encode_mp4(np.full((5, 16, 16, 3), 90, np.uint8), 8.0))
    table = {
        "path_a": [f"{a}.png" for a, _ in LEVELS] + ["clip.mp4", "200.png"],
        "path_b": [f"{b}.png" for _, b in LEVELS] + ["10.png", "10.png"],
        "label": [*LABELS, "A", "a"],
        "prompt": ["p", "p", "q", "q", "r", "s", "t", "p"],
    }
    pq.write_table(pa.table(table), place / "pairs.parquet")
    rewards = [x for name in ("same", "dark", "bright") for x in ("-r", f"own.py:{name}")]
    status, text, err = agree(capsys, "pairs.parquet", *rewards, "--set", "own.py:bright.segments.count=2")
    assert status == 0, err
    report = json.loads((place / "agreement/agreement.json").read_text())
    assert report["pairs"] == 8 and report["prompts"] == 5 and report["labels"] == {"a": 5, "b": 2, "tie": 1}
    assert [row["reward"] for row in report["rewards"]] == ["own.py:bright", "own.py:same", "own.py:dark"]
    assert [row["accuracy"]["mean"] for row in report["rewards"]] == [1.0, 0.5, 0.0]
    bright = report["rewards"][0]
    assert bright["calibration"]["slope"] > 0 > report["rewards"][2]["calibration"]["slope"]
    assert 1 <= bright["tie_threshold"] < 10 and report["rewards"][2]["against_best"]["mean"] == -1
    assert "8 pairs of 5 prompts (5 a, 2 b, 1 tie)" in text and "100.0 %" in text
    calls = len((place / "calls").read_text())
    assert calls == 10 + 2 + 1  # a file once per prompt, two frames of the clip
    assert agree(capsys, "pairs.parquet", *rewards)[0] == 0
    assert len((place / "calls").read_text()) == calls  # nothing is scored again


def test_pairs_of_bytes_and_of_datasets_images(capsys, place):
    a, b = [png(x) for x, _ in LEVELS], [png(x) for _, x in LEVELS]
    plain = {"bytes_a": a, "bytes_b": b, "label": LABELS}
    images = {**plain, "bytes_a": [{"bytes": x, "path": None} for x in a], "bytes_b": [{"bytes": x} for x in b]}
    for number, table in enumerate((plain, images)):
        pq.write_table(pa.table(table), place / f"{number}.parquet")
        status, _, err = agree(capsys, f"{number}.parquet", "-r", "own.py:bright", "-o", f"out{number}")
        assert status == 0, err
    first, second = ((place / f"out{i}/agreement.json").read_text() for i in (0, 1))
    assert first == second and json.loads(first)["rewards"][0]["accuracy"]["mean"] == 1.0
    assert json.loads(first)["prompts"] == 6  # no prompts: each pair stands for itself
    names = pq.read_table(place / "out0/scores.parquet").column("path").to_pylist()
    assert all(name.startswith("sha256:") for name in names)


def test_raters_are_summarised_and_a_repeated_pair_counts_once(capsys, place):
    for level in (10, 200):
        (place / f"{level}.png").write_bytes(png(level))
    table = {
        "path_a": ["10.png", "200.png", "10.png"],
        "path_b": ["200.png", "10.png", "200.png"],
        "label": ["b", "b", "b"],  # the second time the darker one
        "rater": ["ada", "ada", "bob"],
        "id": ["1", "2", "3"],
        "repeat_of": [None, "1", None],
    }
    pq.write_table(pa.table(table), place / "pairs.parquet")
    status, text, err = agree(capsys, "pairs.parquet", "-r", "own.py:bright")
    assert status == 0, err
    report = json.loads((place / "agreement/agreement.json").read_text())
    assert report["pairs"] == 2 and report["rewards"][0]["accuracy"]["mean"] == 1.0
    assert report["raters"]["raters"][0]["consistency"]["mean"] == 0.0 and report["raters"]["agreement"]["mean"] == 1.0
    assert "raters agree with each other: 100.0 % on 1 shared pairs" in " ".join(text.split())


def test_a_column_splits_the_agreement(capsys, place):
    table = {
        "bytes_a": [png(a) for a, _ in LEVELS], "bytes_b": [png(b) for _, b in LEVELS], "label": LABELS,
        "prompt": list("ppqqrs"), "subset": ["dim", "safety/crime", "dim", "dim", "dim", None],
    }  # fmt: skip
    table["label"] = ["a", *LABELS[1:]]  # wrong once, in the first subset
    pq.write_table(pa.table(table), place / "pairs.parquet")
    rewards = ["-r", "own.py:bright", "-r", "own.py:dark"]
    status, text, err = agree(capsys, "pairs.parquet", *rewards, "--by", "subset")
    assert status == 0, err
    by = json.loads((place / "agreement/agreement.json").read_text())["by"]
    assert by["column"] == "subset" and [row["value"] for row in by["subsets"]] == ["dim", "safety/crime", ""]
    assert [row["pairs"] for row in by["subsets"]] == [4, 1, 1]
    dim = by["subsets"][0]["accuracy"]  # the tie counts in no accuracy
    assert dim["own.py:bright"]["mean"] == pytest.approx(2 / 3) and dim["own.py:bright"]["n"] == 3
    assert dim["own.py:dark"]["mean"] == pytest.approx(1 / 3) and "safety/crime" in text
    status, _, err = agree(capsys, "pairs.parquet", *rewards, "--by", "subsets")
    assert status == 2 and "--by: pairs.parquet has no column 'subsets'; did you mean subset?" in err


def test_what_cannot_be_scored_is_left_out_and_said(capsys, place):
    table = {
        "bytes_a": [png(20), b"not a picture", png(200), png(90)],
        "bytes_b": [png(10), png(5), png(100), png(80)],
        "label": ["a", "a", "a", "b"],
        "prompt": ["p", "q", "r", "s"],
    }
    pq.write_table(pa.table(table), place / "pairs.parquet")
    status, _, err = agree(capsys, "pairs.parquet", "-r", "own.py:picky", "-r", "own.py:bright")
    assert status == 1 and "2 of 4 pairs could not be scored by every reward" in err and "row 1" in err
    report = {r["reward"]: r for r in json.loads((place / "agreement/agreement.json").read_text())["rewards"]}
    assert report["own.py:picky"]["failed"] == 2 and report["own.py:picky"]["accuracy"]["n"] == 2
    assert report["own.py:bright"]["failed"] == 1 and report["own.py:bright"]["accuracy"]["mean"] == pytest.approx(
        2 / 3
    )
    rows = pq.read_table(place / "agreement/scores.parquet").to_pylist()
    unknown = next(row["error"] for row in rows if "is not a picture or video" in (row["error"] or ""))
    assert unknown.startswith("sha256:") and "rushes-agree" not in unknown


@pytest.mark.parametrize(
    "table, parts",
    [
        ({"path_a": ["a"], "path_b": ["b"]}, ["no column 'label'", "path_a, path_b", "label (a, b or tie)"]),
        ({"path_a": ["a"], "path_B": ["b"], "label": ["a"]}, ["no column 'path_b'", "rename path_B"]),
        ({"bytes_a": [b"x"], "label": ["a"]}, ["no column 'bytes_b'"]),
        ({"left": ["a"], "right": ["b"], "label": ["a"]}, ["no column 'path_a'", "left, right"]),
        ({"path_a": ["a"], "path_b": ["b"], "label": ["left"]}, ["row 1: label 'left'", "a, b, tie"]),
        ({"path_a": ["a"], "path_b": ["b"], "label": [1]}, ["row 1: label 1"]),
        ({"path_a": ["a", None], "path_b": ["b", "b"], "label": ["a", "a"]}, ["row 2: path_a must be a path"]),
        ({"bytes_a": [None], "bytes_b": [b"x"], "label": ["a"]}, ["row 1: bytes_a must be bytes"]),
        ({"path_a": ["a"], "path_b": ["b"], "label": ["a"], "prompt": [3]}, ["row 1: prompt must be text"]),
        ({"path_a": pa.array([], "string"), "path_b": pa.array([], "string"), "label": []}, ["holds no pairs"]),
    ],
)
def test_wrong_tables_are_one_clear_line(capsys, place, table, parts):
    pq.write_table(pa.table(table), place / "pairs.parquet")
    status, _, err = agree(capsys, "pairs.parquet", "-r", "own.py:bright")
    assert status == 2 and all(part in err for part in ["pairs.parquet", *parts]), err


def test_other_wrong_calls(capsys, place):
    (place / "text.parquet").write_text("hello")
    pq.write_table(pa.table({"path_a": ["a"], "path_b": ["b"], "label": ["a"]}), place / "p.parquet")
    for args, part in (
        (["none.parquet", "-r", "own.py:dark"], "no such file"),
        (["text.parquet", "-r", "own.py:dark"], "cannot be read as parquet"),
        (["p.parquet"], "--reward"),
        (["p.parquet", "-r", "own.py:drak"], "did you mean dark"),
        (["p.parquet", "-r", "own.py:dark", "-o", "text.parquet/x"], "--out"),
    ):
        status, _, err = agree(capsys, *args)
        assert status != 0 and part in err, err
