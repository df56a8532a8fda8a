"""`rushes generate --search` and `rushes evaluate --search` on a tiny pipeline."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from command import run

import jobs.common.search_generate as command
from jobs import cli
from pipeline.config.load import to_yaml
from pipeline.core.media import read_media
from pipeline.search.base import START

SEARCH = """name: fk
passes: 3
at: [1, 2]
"""


@pytest.fixture(scope="module")
def root(tiny_sd3, tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    (root / "heldout.txt").write_text("a red circle\nb blue square\nc green circle\n")
    cfg = tiny.config(
        tiny_sd3,
        prompts={"train": str(root / "heldout.txt"), "heldout": str(root / "heldout.txt")},
        evaluation={"steps": 5, "batch": 6, "takes_per_prompt": 1},
        rewards={"r": {"scorer": "jpeg_compressibility"}, "seen": {"scorer": "jpeg_compressibility", "weight": 0.0}},
    )
    (root / "c.yaml").write_text(to_yaml(cfg))
    (root / "fk.yaml").write_text(SEARCH)
    return root


def generate(capsys, root, out, *args, search="fk.yaml"):
    name = str(root / search) if search.endswith(".yaml") else search
    prompts = ["--prompts", str(root / "heldout.txt")]
    return run(capsys, "generate", str(root / "c.yaml"), *prompts, "--search", name, "--out", str(out), *args)


@pytest.fixture(scope="module")
def found(root):
    """A finished folder."""
    out = root / "found"
    args = ["--prompts", str(root / "heldout.txt"), "--search", str(root / "fk.yaml"), "--out", str(out)]
    assert cli.main(["generate", str(root / "c.yaml"), *args]) == 0
    return out


def test_takes_ancestry_and_page(found):
    takes, rows = (
        pq.read_table(found / "takes.parquet").to_pylist(),
        pq.read_table(found / "search.parquet").to_pylist(),
    )
    assert [take["prompt_index"] for take in takes] == [0, 1, 2] and {take["take"] for take in takes} == {0}
    for take in takes:
        mine = [row for row in rows if (row["prompt_index"], row["take_seed"]) == (take["prompt_index"], take["seed"])]
        assert mine[-1]["calls"] == 3 * 5 and {row["level"] for row in mine} == {1, 2, 5}
        finished = [row for row in mine if row["level"] == 5]
        (best,) = [row for row in finished if row["kept"]]
        assert best["score"] == max(row["score"] for row in finished) == pytest.approx(take["reward"], abs=1e-6)
        assert take["reward/seen"] == take["reward/r"]  # watched, and no part of what steers
        by_node = {row["node"]: row for row in mine}
        while best["parent"] >= 0:
            assert best["kept"] and by_node[best["parent"]]["level"] < best["level"]
            best = by_node[best["parent"]]
        assert all(row["picture"].startswith(b"\x89PNG") for row in mine)
    page = (found / "search.html").read_text()
    assert (
        page.count("<svg") == 3 and page.count("<image") == len(rows) and "http" not in page.replace("http-equiv", "")
    )
    assert min(row["level"] for row in rows) > START


def test_an_interrupted_search_goes_on_with_what_is_missing(capsys, root, found, monkeypatch):
    out, written = root / "resumed", []

    def stop(*args, **kwargs):
        if written:
            raise KeyboardInterrupt
        written.append(1)
        return write(*args, **kwargs)

    write = command.write_chunk
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_chunk", stop)
        assert generate(capsys, root, out)[0] != 0
    assert len(pq.read_table(out / "takes.parquet")) == 2  # of three: the first chunk
    status, text, _ = generate(capsys, root, out, "--resume")
    assert status == 0 and text.startswith("1 take in ")
    for name in ("takes.parquet", "search.parquet"):
        assert pq.read_table(out / name).equals(pq.read_table(found / name))
    for take in pq.read_table(out / "takes.parquet").to_pylist():
        assert np.array_equal(read_media(out / take["path"]).frames, read_media(found / take["path"]).frames)
    status, text, _ = generate(capsys, root, out, "--resume")
    assert status == 0 and "holds all of these takes already" in text


def test_one_pass_of_best_of_n_is_the_plain_take(capsys, root, tmp_path):
    args = ["-p", "a red circle", "--takes", "2"]
    assert run(capsys, "generate", str(root / "c.yaml"), *args, "--out", str(tmp_path / "plain"))[0] == 0
    search = ["--search", "best-of-n", "--passes", "1", "--out", str(tmp_path / "one")]
    assert run(capsys, "generate", str(root / "c.yaml"), *args, *search)[0] == 0
    takes = [pq.read_table(tmp_path / name / "takes.parquet").to_pylist() for name in ("plain", "one")]
    for plain, one in zip(*takes, strict=True):
        a, b = (read_media(tmp_path / n / t["path"]).frames for n, t in (("plain", plain), ("one", one)))
        assert plain["seed"] == one["seed"] and np.array_equal(a, b)


def test_searches_are_compared(capsys, root, tmp_path):
    args = ["--search", "best-of-n", "--search", str(root / "fk.yaml"), "--passes", "1", "--passes", "3"]
    status, text, err = run(capsys, "evaluate", str(root / "c.yaml"), *args, "--out", str(tmp_path))
    assert status == 0, err
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["search"], round(row["passes"], 6)) for row in rows] == [
        ("plain", 1), ("best-of-n", 1), ("best-of-n", 3), ("fk", 1), ("fk", 3)
    ]  # fmt: skip
    assert rows[0]["reward"] == rows[1]["reward"] and rows[1]["difference"]["mean"] == 0
    assert rows[2]["difference"]["mean"] >= 0 and rows[2]["reward"]["n"] == 3 and rows[2]["reward"]["ci95"] > 0
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG") and "best-of-n" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--search", "fk", "--passes", "0"], "--passes: passes: found 0; expected whole number >= 1"),
        (["--search", "fkk"], "search: found 'fkk'; expected one of best-of-n, dts, dts-star, fk"),
        (["--search", "none.yaml"], "--search none.yaml: no such file"),
        (["--search", "ROOT/c.yaml"], "c.yaml: holds no name; write name: with one of best-of-n"),
        (["--search", "ROOT/bad.yaml"], "bad.yaml:2: strenght: unknown key; did you mean strength?"),
        (["--search", "ROOT/still.yaml"], "still.yaml:2: noise_level: found 0; expected number > 0 or null"),
        (["--search", "ROOT/late.yaml"], "search fk: at: found [9]; expected rising levels from 1 to"),
        (["--search", "fk", "rewards.r.weight=0"], "rewards: every weight is 0"),
        (["--search", "fk", "--steps", "1"], "none of the 1 sampler steps can draw noise"),
        (["--passes", "2"], "--passes belongs to a search; add --search NAME"),
        (["--resume"], "--resume belongs to a search; add --search NAME"),
    ],
)
def test_wrong_use_is_one_line(capsys, root, tmp_path, args, message):
    (root / "bad.yaml").write_text("name: fk\nstrenght: 3\n")
    (root / "still.yaml").write_text("name: fk\nnoise_level: 0\n")
    (root / "late.yaml").write_text("name: fk\nat: [9]\n")
    args = [text.replace("ROOT", str(root)) for text in args]
    status, _, err = run(capsys, "generate", str(root / "c.yaml"), "-p", "a", "-o", str(tmp_path / "g"), *args)
    assert status in (1, 2) and message in err and len(err.strip().splitlines()) == 1


def test_another_search_needs_another_folder(capsys, root, found):
    assert "--resume to go on with them" in generate(capsys, root, found)[2]
    assert "found by another search" in generate(capsys, root, found, "--resume", search="best-of-n")[2]
