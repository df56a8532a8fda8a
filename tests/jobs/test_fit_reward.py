"""`rushes fit-reward`: a table of judged pictures and clips becomes a reward that `rushes agree` finds good."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import run
from PIL import Image

from pipeline.core.media import encode_mp4

CLIP = str(Path(__file__).parents[2] / "models" / "shapes-clip")
PROMPTS = ["a red circle", "a blue square", "a green triangle", "a yellow circle", "a red square", "a blue triangle"]


def png(level):
    buffer = io.BytesIO()
    Image.fromarray(np.full((24, 24, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def table(tmp_path):
    """People who like it bright, for 6 pairs of each prompt; two of them are clips."""
    rng = np.random.default_rng(0)
    rows = []
    for prompt in PROMPTS:
        for number in range(6):
            low, high = int(rng.integers(30, 110)), int(rng.integers(140, 240))
            first_is_better = bool(rng.integers(2))
            levels = (high, low) if first_is_better else (low, high)
            if number == 5:
                sides = [encode_mp4(np.full((6, 24, 24, 3), level, np.uint8), 8.0) for level in levels]
            else:
                sides = [png(level) for level in levels]
            rows.append((prompt, *sides, "a" if first_is_better else "b", "ada", f"{prompt}{number}", None))
    rows.append((PROMPTS[0], *rows[0][1:3], rows[0][3], "ada", "again", f"{PROMPTS[0]}0"))
    rows.append((PROMPTS[0], b"\x89PNG broken", png(20), "b", "ada", "broken", None))
    rows.append(("", png(20), png(30), "a", "ada", "nothing", None))
    rows.append((PROMPTS[0], png(20), png(200), "a", "bob", "other", None))
    rows.append((PROMPTS[1], png(99), png(100), "tie", "ada", "tie", None))
    names = ("prompt", "bytes_a", "bytes_b", "label", "rater", "id", "repeat_of")
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), tmp_path / "p.parquet")
    return tmp_path / "p.parquet"


def test_a_taste_becomes_a_scorer_and_what_was_dropped_is_said(capsys, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "fit-reward", table, "--base", CLIP, "--out", "mine", "--rater", "ada")
    assert status == 0, err
    for reason in ("a repeat of an earlier answer", "a take cannot be read", "no prompt", "another rater"):
        assert f"dropped 1: {reason} (first: row " in out, reason
    report = json.loads((tmp_path / "mine/fit.json").read_text())
    assert (report["pairs"], report["ties"], report["prompts"], report["raters"]) == (37, 1, 6, 1)
    assert report["accuracy"]["mean"] > 0.9 and report["accuracy"]["prompts"] == 6
    assert report["against_base"]["mean"] > 0.15 and "agrees with held-out answers: " in out
    assert sum(row["n"] for row in report["bins"]) == 36
    card = (tmp_path / "mine/README.md").read_text()
    digest = out.rsplit("digest ", 1)[1].split(";")[0]
    assert f"digest: {digest}" in card and "37 answers about" in card
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "README.md", "config.json", "fit.json", "head.safetensors"
    ]  # fmt: skip

    pairs = pq.read_table(table).filter(pa.compute.field("rater") == "ada").slice(0, 36)
    pq.write_table(pairs, "good.parquet")
    options = ["-r", "fitted_clip", "--set", "fitted_clip.args.path=mine", "--set", f"fitted_clip.args.digest={digest}"]
    status, out, err = run(capsys, "agree", "good.parquet", *options)
    assert status == 0, err
    agreement = json.loads((tmp_path / "agreement/agreement.json").read_text())["rewards"][0]
    assert agreement["accuracy"]["mean"] == 1.0 and agreement["calibration"]["slope"] > 0.5

    status, _, err = run(capsys, "fit-reward", table, "--base", CLIP, "--out", "mine")
    assert status == 2 and "is there already" in err
    status, _, err = run(capsys, "fit-reward", table, "--base", CLIP, "--out", "two", "--rater", "ada", "--heads", "2")
    assert status == 2 and "--heads 2: the answers name 1 rater" in err


def test_raters_are_told_apart_and_one_is_added(capsys, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bright = [row for row in pq.read_table(table).to_pylist() if row["rater"] == "ada" and row["repeat_of"] is None]
    bright = [row for row in bright if row["label"] != "tie" and row["prompt"] and row["id"] != "broken"]
    flip = {"a": "b", "b": "a"}
    dark = [row | {"rater": "bob", "label": flip[row["label"]]} for row in bright]
    new = [row | {"rater": "cleo", "label": flip[row["label"]]} for row in bright[::3]]
    for name, rows in (("both", bright + dark), ("new", new), ("more", dark[1::3])):
        rows = [{key: value for key, value in row.items() if key != "id"} for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), f"{name}.parquet")
    status, out, err = run(capsys, "fit-reward", "both.parquet", "--base", CLIP, "--out", "two", "--heads", "2")
    assert status == 0, err
    apart = json.loads((tmp_path / "two/fit.json").read_text())
    assert min(share["mean"] for share in apart["by_rater"].values()) > 0.8 and "| ada" not in out
    assert "* bob" in (tmp_path / "two/README.md").read_text()
    status, _, err = run(capsys, "fit-reward", "new.parquet", "--base", "two", "--out", "three")
    assert status == 0, err
    for user, least in (("cleo", 0.8), ("bob", 0.8), ("ada", 0.0)):
        sets = [
            x for key, value in (("path", "three"), ("user", user)) for x in ("-s", f"fitted_clip.args.{key}={value}")
        ]
        assert run(capsys, "agree", "more.parquet", "-r", "fitted_clip", *sets, "-o", user)[0] == 0
        share = json.loads((tmp_path / user / "agreement.json").read_text())["rewards"][0]["accuracy"]["mean"]
        assert share >= least and (user != "ada" or share < 0.3), (user, share)
    for options, message in (
        (["both.parquet", "--base", "two", "--out", "x"], "--base: knows 'ada' already"),
        (["new.parquet", "--base", "two", "--out", "x", "--heads", "2"], "has its 2 heads already"),
    ):
        status, _, err = run(capsys, "fit-reward", *options)
        assert status == 2 and message in err
