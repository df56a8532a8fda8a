"""Bad configs, prompts, checkpoints, reward files and machines, refused by `rushes train` before anything starts: one
line that names the culprit and a fix, a status other than 0, and no traceback."""

from __future__ import annotations

import errno
import os
import shutil
import socket

import pytest
from bad_input import Place

from jobs import cli
from pipeline.tools import preflight_machine


@pytest.fixture
def place(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RUSHES_DEBUG", raising=False)
    return Place(tmp_path, capsys, monkeypatch)


def test_the_place_itself_is_fine(place, capsys):
    assert cli.main(["train", str(place.config), "--dry-run"]) == 0


# Each case: what is done to the place, returning (status, line); what the line must hold; the fix it must offer.


def unknown_key(p):
    return p.train("step.takess=4")


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


def resume_of_nothing(p):
    return p.error("train", p.config, "--resume")


def resume_or_start_without_name(p):
    return p.error("train", p.config, "--resume-or-start")


CASES = [
    (unknown_key, ["step.takess"], "did you mean step.takes?"),
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
    (disk_too_small, ["run.dir", "0 MiB free"], "free some space"),
    (run_dir_is_a_file, ["run.dir", "file"], "choose another path"),
    (no_write_permission, ["run.dir", "runs: no permission"], "choose a folder you may write to"),
    (port_taken, ["ray.init.dashboard_port: port", "is taken"], "choose another one"),
    (no_gpu, ["learner.device", "no GPU"], "use auto or cpu"),
    (too_few_cpus, ["ray.init.num_cpus", "has 4"], "set ray.init.num_cpus="),
    (tracker_missing, ["tracking.backends: tensorboard"], "pip install"),
    (resume_of_nothing, ["--resume", "no unfinished run"], "leave --resume out"),
    (resume_or_start_without_name, ["--resume-or-start", "run.name is not set"], "give one"),
]


@pytest.mark.parametrize("case, parts, fix", CASES, ids=[case.__name__ for case, _, _ in CASES])
def test_bad_input_is_one_clear_line(place, case, parts, fix):
    _, line = case(place)
    for part in [*parts, fix]:
        assert part in line, line
