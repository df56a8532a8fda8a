"""Bad input through the command line: each case is one line that names the culprit and a fix, a status other than 0,
and no traceback."""

import errno
import json
import os
import shutil
import socket

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_checkpoint import fake_config
from made_up_run import make_run, moving_square
from PIL import Image

from jobs import cli
from pipeline.config.load import to_yaml
from pipeline.core.media import encode_mp4
from pipeline.tools import preflight_machine


class Place:
    """A folder with a config whose every check passes, and a way to run the command on it."""

    def __init__(self, root, capsys, monkeypatch):
        self.root, self.capsys, self.monkeypatch = root, capsys, monkeypatch
        self.config = root / "run.yaml"
        self.config.write_text(to_yaml(fake_config(root)))
        self.weights = root / "model/transformer/diffusion_pytorch_model.safetensors"

    def write(self, name, text):
        (self.root / name).write_text(text, encoding="utf-8")
        return self.root / name

    def scorer(self, body):
        path = self.write("mine.py", f"def score(frames, prompt):\n    {body}\n")
        Image.fromarray(moving_square(True, 1, 0)[0]).save(self.root / "a.png")
        return ["score", str(self.root / "a.png"), "-r", f"{path}:score", "-o", str(self.root / "scores.parquet")]

    def error(self, *args):
        """(status, the error line); checks that it is one line and no traceback."""
        status = cli.main([str(a) for a in args])
        out, err = self.capsys.readouterr()
        assert status != 0, out
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert "Traceback" not in out + err
        return status, err.strip()

    def train(self, *overrides):
        return self.error("train", self.config, *overrides, "--dry-run")


@pytest.fixture
def place(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RUSHES_DEBUG", raising=False)
    return Place(tmp_path, capsys, monkeypatch)


def test_the_place_itself_is_fine(place, capsys):
    assert cli.main(["train", str(place.config), "--dry-run"]) == 0


# Each case: what is done to the place, returning (status, line); what the line must hold; the fix it must offer.


def unknown_key(p):
    return p.train("algorithm.group_sizes=4")


def wrong_type(p):
    return p.train("run.steps=many")


def out_of_range(p):
    return p.train("optimizer.lr=-1")


def wrong_choice(p):
    return p.train("sampler.kind=flow")


def missing_config(p):
    return p.error("train", p.root / "rum.yaml")


def yaml_syntax(p):
    return p.error("train", p.write("bad.yaml", "run:\n  steps: [1\nrewards: {}\n"))


def key_twice(p):
    return p.error("train", p.write("twice.yaml", "run: {seed: 1}\nrun: {seed: 2}\n"))


def no_rewards(p):
    return p.train("rewards={}")


def bad_override(p):
    return p.train("run.steps")


def missing_prompts(p):
    (p.root / "train.txt").rename(p.root / "train2.txt")
    return p.train()


def empty_prompts(p):
    p.write("train.txt", "\n\n")
    return p.train()


def long_prompt(p):
    p.write("train.txt", "a red circle\n" + "x" * 10_000 + "\n")
    return p.train()


def prompts_not_utf8(p):
    (p.root / "train.txt").write_bytes(b"ok\n\xff\xfe\xfa\n")
    return p.train()


def bad_jsonl(p):
    path = p.write("train.jsonl", '{"prompt": "a"}\n{prompt: b}\n')
    return p.train(f"prompts.train={path}")


def missing_image(p):
    path = p.write("train.jsonl", '{"prompt": "a", "image": "cat.png"}\n')
    return p.train(f"prompts.train={path}")


def heldout_overlap(p):
    p.write("heldout.txt", "a red circle\n")
    return p.train()


def missing_generator(p):
    return p.train(f"generator.pretrained={p.root / 'modle'}")


def cut_weights(p):
    p.weights.write_bytes(p.weights.read_bytes()[:-1000])
    return p.train()


def pickle_weights(p):
    p.weights.rename(p.weights.with_name("diffusion_pytorch_model.bin"))
    return p.train()


def bad_model_index(p):
    (p.root / "model/model_index.json").write_text("{nope")
    return p.train()


def wrong_size(p):
    return p.train("generator.width=50")


def unknown_scorer(p):
    return p.train("rewards.jpeg.scorer=jpeg_compresibility")


def reward_file_missing(p):
    return p.train("rewards.mine.scorer=not_there.py:score")


def reward_function_missing(p):
    path = p.write("mine.py", "def scores(frames, prompt):\n    return 1\n")
    return p.train(f"rewards.mine.scorer={path}:score")


def reward_syntax(p):
    return p.train(f"rewards.mine.scorer={p.write('mine.py', 'def score(:')}:score")


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


def disk_too_small(p):
    p.monkeypatch.setattr(
        preflight_machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000)
    )
    return p.train()


def run_dir_is_a_file(p):
    return p.train(f"run.dir={p.write('file', '')}/runs")


def no_write_permission(p):
    def refused(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    p.monkeypatch.setattr(preflight_machine.tempfile, "NamedTemporaryFile", refused)
    return p.train()


def out_is_a_folder_of_a_file(p):
    args = p.scorer("return 1.0")
    args[-1] = str(p.write("file", "") / "s.parquet")
    return p.error(*args)


def port_taken(p):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        return p.train(f"ray.init.dashboard_port={taken.getsockname()[1]}")


def no_gpu(p):
    p.monkeypatch.setattr(preflight_machine, "gpu_count", lambda: 0)
    return p.train("learner.device=cuda")


def too_few_cpus(p):
    return p.train("rollout.workers=50")


def tracker_missing(p):
    p.monkeypatch.setattr(preflight_machine.importlib.util, "find_spec", lambda name: None)
    return p.train()


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


def resume_of_nothing(p):
    return p.error("train", p.config, "--resume")


def resume_or_start_without_name(p):
    return p.error("train", p.config, "--resume-or-start")


def unknown_command(p):
    return p.error("trian")


def unknown_option(p):
    return p.error("train", p.config, "--resum")


CASES = [
    (unknown_key, ["algorithm.group_sizes"], "did you mean algorithm.group_size?"),
    (wrong_type, ["run.steps", "'many'"], "expected whole number >= 1"),
    (out_of_range, ["optimizer.lr", "-1"], "expected number > 0"),
    (wrong_choice, ["sampler.kind", "'flow'"], "one of flow_sde, dance_sde, cps, ddim, "),
    (missing_config, ["rum.yaml"], "did you mean run.yaml?"),
    (yaml_syntax, ["bad.yaml:3:", "not valid YAML"], "check indentation"),
    (key_twice, ["twice.yaml:2", "run is given twice"], "keep one"),
    (no_rewards, ["rewards: found none"], "such as rewards:"),
    (bad_override, ["'run.steps'"], "write it as key=value"),
    (missing_prompts, ["prompts.train", "train.txt: no such"], "did you mean train2.txt?"),
    (empty_prompts, ["train.txt: holds no prompts"], "put one in each line"),
    (long_prompt, ["train.txt, line 2", "10,000 characters"], "shorten it"),
    (prompts_not_utf8, ["train.txt, line 2"], "save the file as UTF-8"),
    (bad_jsonl, ["train.jsonl, line 2", "not valid JSON"], "one object a line"),
    (missing_image, ["train.jsonl, line 1", "cat.png"], "relative to the prompts file"),
    (heldout_overlap, ["heldout.txt, line 1", "a red circle"], "remove it"),
    (missing_generator, ["generator.pretrained", "modle"], "diffusers folder"),
    (cut_weights, ["transformer/diffusion_pytorch_model.safetensors", "header states"], "copy it again"),
    (pickle_weights, ["diffusion_pytorch_model.bin", "pickle"], "safe_serialization=True"),
    (bad_model_index, ["model_index.json", "not valid JSON"], "copy the checkpoint again"),
    (wrong_size, ["generator.width", "found 50"], "48 or 64"),
    (unknown_scorer, ["rewards.jpeg", "jpeg_compresibility"], "did you mean jpeg_compressibility?"),
    (reward_file_missing, ["rewards.mine", "not_there.py"], "check the path"),
    (reward_function_missing, ["rewards.mine", "no function 'score'"], "did you mean scores?"),
    (reward_syntax, ["rewards.mine", "mine.py:1", "syntax error"], "correct that line"),
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
    (disk_too_small, ["run.dir", "0 MiB free"], "free some space"),
    (run_dir_is_a_file, ["run.dir", "file"], "choose another path"),
    (no_write_permission, ["run.dir", "runs: no permission"], "choose a folder you may write to"),
    (out_is_a_folder_of_a_file, ["--out", "file"], "choose another path"),
    (port_taken, ["ray.init.dashboard_port: port", "is taken"], "choose another one"),
    (no_gpu, ["learner.device", "no GPU"], "use auto or cpu"),
    (too_few_cpus, ["ray.init.num_cpus", "has 4"], "set ray.init.num_cpus="),
    (tracker_missing, ["tracking.backends: tensorboard"], "pip install"),
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
    (resume_of_nothing, ["--resume", "no unfinished run"], "leave --resume out"),
    (resume_or_start_without_name, ["--resume-or-start", "run.name is not set"], "give one"),
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
    "raised, status, text",
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (ZeroDivisionError("oops"), 70, "internal error: ZeroDivisionError: oops; run again with --debug"),
        (OSError(errno.ENOSPC, "x", "/data/out"), 1, "/data/out: the disk is full"),
        (PermissionError(errno.EACCES, "x", "/data/out"), 1, "/data/out: no permission"),
    ],
)
def test_other_exceptions_are_one_line_too(place, raised, status, text):
    def broken(*_args):
        raise raised

    place.monkeypatch.setattr("pipeline.config.load.load_config", broken)
    found, line = place.error("config", place.config)
    assert found == status and text in line
