"""Bad input to the commands, and rewards that fail: one line that names the culprit and a fix, a status other than 0,
and no traceback; scores made before are kept."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_input import Place
from made_up_run import make_run, moving_square
from PIL import Image

from jobs import cli
from pipeline.core.media import encode_mp4


@pytest.fixture
def place(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RUSHES_DEBUG", raising=False)
    return Place(tmp_path, capsys, monkeypatch)


# Each case: what is done to the place, returning (status, line); what the line must hold; the fix it must offer.


def reward_raises(p):
    return p.error(*p.scorer("raise ValueError('no face found')"))


def reward_nan(p):
    return p.error(*p.scorer("return float('nan')"))


def reward_wrong_length(p):
    return p.error(*p.scorer("return [1.0, 2.0, 3.0]"))


def batched_reward_wrong_length(p):
    args = p.scorer("return [1.0, 2.0, 3.0]\nscore.batched = True")
    return p.error(*args)


def corrupt_mp4(p):
    data = encode_mp4(moving_square(True, 9, 0), 8.0)
    (p.root / "clip.mp4").write_bytes(data[: len(data) // 2])
    return p.error("score", p.root / "clip.mp4", "-r", "jpeg_compressibility", "-o", p.root / "s.parquet")


def not_a_picture(p):
    p.write("a.png", "hello")
    return p.error("score", p.root / "a.png", "-r", "jpeg_compressibility", "-o", p.root / "s.parquet")


def nothing_to_score(p):
    (p.root / "empty").mkdir()
    return p.error("score", p.root / "empty", "-r", "jpeg_compressibility", "-o", p.root / "s.parquet")


def foreign_table(p):
    pq.write_table(pa.table({"x": [1]}), p.root / "s.parquet")
    Image.fromarray(moving_square(True, 1, 0)[0]).save(p.root / "a.png")
    return p.error("score", p.root / "a.png", "-r", "jpeg_compressibility", "-o", p.root / "s.parquet")


def no_reward_given(p):
    return p.error("score", p.root, "-o", p.root / "s.parquet")


def disk_full(p):
    args = p.scorer("return 1.0")

    def full(_fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    p.monkeypatch.setattr(os, "fsync", full)
    return p.error(*args)


def out_is_a_folder_of_a_file(p):
    args = p.scorer("return 1.0")
    args[-1] = str(p.write("file", "") / "s.parquet")
    return p.error(*args)


def report_of_nothing(p):
    return p.error("report", p.root / "runs" / "none")


def report_with_broken_metrics(p):
    run = make_run(p.root, steps=2, finished=False)
    (run / "metrics.jsonl").write_text("{broken}\n" + (run / "metrics.jsonl").read_text())
    return p.error("report", run)


def export_of_nothing(p):
    return p.error("export", p.root / "runs" / "none")


def export_without_checkpoint(p):
    return p.error("export", make_run(p.root))


def checkpoint_folder(p, spoil):
    from safetensors.numpy import save_file

    run = make_run(p.root)
    folder = run / "checkpoints" / "step-000040"
    folder.mkdir(parents=True)
    save_file({"weights/transformer.x": np.zeros(8, np.float32)}, folder / "tensors.safetensors")
    (folder / "state.json").write_text("{}")
    (folder / "identity.json").write_text("{}")
    from pipeline.runs.checkpoint import _fingerprint

    files = {path.name: _fingerprint(path) for path in folder.iterdir()}
    (folder / "MANIFEST.json").write_text(json.dumps({"format": 1, "step": 40, "files": files}))
    spoil(folder)
    return run


def corrupt_checkpoint(p):
    def spoil(folder):
        data = bytearray((folder / "tensors.safetensors").read_bytes())
        data[-4] ^= 0xFF
        (folder / "tensors.safetensors").write_bytes(data)

    return p.error("export", checkpoint_folder(p, spoil))


def cut_checkpoint(p):
    def spoil(folder):
        data = (folder / "tensors.safetensors").read_bytes()
        (folder / "tensors.safetensors").write_bytes(data[:-10])

    return p.error("evaluate", p.config, "-c", checkpoint_folder(p, spoil))


def no_such_step(p):
    return p.error("export", checkpoint_folder(p, lambda folder: None), "--step", 7)


def generate_without_prompt(p):
    return p.error("generate", p.config, "--out", p.root / "g")


def generate_over_takes(p):
    run = make_run(p.root)
    return p.error("generate", p.config, "-p", "a", "--out", run / "eval/step-000000")


def generate_with_strange_checkpoint(p):
    (p.root / "empty").mkdir()
    return p.error("generate", p.config, "-p", "a", "-c", p.root / "empty", "-o", p.root / "g")


def unknown_command(p):
    return p.error("trian")


def unknown_option(p):
    return p.error("train", p.config, "--resum")


CASES = [
    (reward_raises, ["mine.py:score", "no face found", "line 2"], "run the same command again"),
    (reward_nan, ["mine.py:score", "NaN"], "return a finite number or raise"),
    (reward_wrong_length, ["mine.py:score", "[1.0, 2.0, 3.0]"], "instead of one number"),
    (batched_reward_wrong_length, ["mine.py:score", "shape [3] for 1 takes"], "expected [1]"),
    (corrupt_mp4, ["clip.mp4", "cut off"], "write it again"),
    (not_a_picture, ["a.png", "not a picture"], "write it again"),
    (nothing_to_score, ["empty: holds no images or videos"], ".mp4"),
    (foreign_table, ["s.parquet", "not a table of scores"], "choose another file"),
    (no_reward_given, ["--reward"], "rushes score --list"),
    (disk_full, ["scores.parquet", "the disk is full"], "free some space"),
    (out_is_a_folder_of_a_file, ["--out", "file"], "choose another path"),
    (report_of_nothing, ["runs/none"], "no such run folder"),
    (report_with_broken_metrics, ["metrics.jsonl:1"], "remove the line"),
    (export_of_nothing, ["runs/none: no such folder"], "give a run"),
    (export_without_checkpoint, ["no complete checkpoint"], "checkpoint.every"),
    (corrupt_checkpoint, ["step-000040 is corrupt", "checksum"], "delete the folder"),
    (cut_checkpoint, ["step-000040 is corrupt", "bytes"], "delete the folder"),
    (no_such_step, ["no checkpoint of step 7"], "there are 40"),
    (generate_without_prompt, ["generate"], '--prompt "some text"'),
    (generate_over_takes, ["--out", "already holds takes"], "choose another folder"),
    (generate_with_strange_checkpoint, ["empty: is neither a run"], "model_index.json"),
    (unknown_command, ["'trian'"], "'train'"),
    (unknown_option, ["--resum"], "--resume"),
]


@pytest.mark.parametrize("case, parts, fix", CASES, ids=[case.__name__ for case, _, _ in CASES])
def test_bad_input_is_one_clear_line(place, case, parts, fix):
    _, line = case(place)
    for part in [*parts, fix]:
        assert part in line, line


def test_nothing_is_lost_when_a_reward_fails_half_way(place):
    path = place.write("mine.py", "def score(frames, prompt):\n    assert prompt != 'b'\n    return 1.0\n")
    for name in "abc":
        Image.fromarray(moving_square(True, 1, 0)[0]).save(place.root / f"{name}.png")
        place.write(f"{name}.txt", name)
    place.error("score", place.root, "-r", f"{path}:score", "-o", place.root / "s.parquet")
    rows = pq.read_table(place.root / "s.parquet").to_pylist()
    assert [row["score"] for row in rows] == [1.0, None, 1.0]


def test_full_disk_keeps_the_scores_of_before(place):
    args = place.scorer("return 1.0")
    assert cli.main(args) == 0
    before = (place.root / "scores.parquet").read_bytes()
    place.capsys.readouterr()
    Image.fromarray(moving_square(True, 1, 1)[0]).save(place.root / "b.png")
    args[1] = str(place.root / "b.png")

    def full(_fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place.monkeypatch.setattr(os, "fsync", full)
    place.error(*args)
    assert (place.root / "scores.parquet").read_bytes() == before


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(place, how):
    args = ["config", str(place.config), "nope=1"]
    if how == "option":
        args.append("--debug")
    else:
        place.monkeypatch.setenv("RUSHES_DEBUG", "1")
    assert cli.main(args) == 2
    err = place.capsys.readouterr().err
    assert "Traceback" in err and err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "raised, exit_status, text",
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (ZeroDivisionError("oops"), 70, "internal error: ZeroDivisionError: oops; run again with --debug"),
        (OSError(errno.ENOSPC, "x", "/data/out"), 1, "/data/out: the disk is full"),
        (PermissionError(errno.EACCES, "x", "/data/out"), 1, "/data/out: no permission"),
    ],
)
def test_other_exceptions_are_one_line_too(place, raised, exit_status, text):
    def broken(*_args):
        raise raised

    place.monkeypatch.setattr("pipeline.config.load.load_config", broken)
    status, line = place.error("config", place.config)
    assert status == exit_status and text in line
