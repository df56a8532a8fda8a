"""`rushes train --dry-run` refuses what the run itself would refuse before it starts Ray, in the same words."""

import shutil
from pathlib import Path

import pytest
import torch
from command import run as plain_command
from fake_checkpoint import fake_config

from jobs.launch import training
from pipeline.config.load import load_config, to_yaml
from pipeline.runs import checkpoint
from pipeline.runs.paths import RunDir

IMAGE, VIDEO = (str(Path("models", name).absolute()) for name in ("shapes-image", "shapes-video"))


def command(capsys, *arguments):
    """(status, stdout, the lines of the error): the first import of diffusers may say something on stderr too."""
    status, out, err = plain_command(capsys, *arguments)
    return status, out, "".join(f"{line}\n" for line in err.splitlines() if line.startswith("error: "))


class Started(Exception):
    """The run has passed all its checks."""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    def start(*_):
        raise Started

    monkeypatch.setattr(training, "RaySession", start)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    generator = {"pretrained": IMAGE, "height": 48, "width": 48, "num_frames": 1, "guidance_scale": 1.0}
    rewards = {"j": {"scorer": "jpeg_compressibility"}}
    path.write_text(to_yaml(fake_config(tmp_path, generator=generator, rewards=rewards)))
    return path


def fp16_only(folder: Path) -> Path:
    """The image model with its denoiser under a variant's name alone."""
    shutil.copytree(IMAGE, folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    return folder


RULES = [
    (["run.name=../up"], "run.name"),
    (["run.steps=1e23"], "run.steps"),
    (["generator.num_frames=2"], "makes single images, so set 1"),
    (["generator.height=36"], "generator.height: found 36"),
    (["generator.width=40.5"], "generator.width"),
    ([f"generator.pretrained={VIDEO}", "generator.num_frames=10"], "generator.num_frames: found 10"),
    (["rewards.mean.scorer=jpeg_compressibility"], "rewards.mean"),
    (["rewards.j.scorer=nothing.py:score"], "nothing.py"),
    (["rewards.j.args.nonsense=1"], "nonsense"),
    (["rewards.h.scorer=http", "rewards.h.args.url=http://a:b@c"], "credentials"),
    (["prompts.train=nowhere.txt"], "nowhere.txt"),
    (["sampler.kind=ddim"], "sampler.kind"),
    (['tracking.backends=["mlflow"]'], "mlflow"),
    (["algorithm.objective=ppo"], "algorithm.objective"),
]


@pytest.mark.parametrize("overrides, words", RULES, ids=[" ".join(rule[0])[:40] for rule in RULES])
def test_a_rule_holds_in_the_dry_run_as_in_the_run(capsys, config, overrides, words):
    status, _, err = command(capsys, "train", config, *overrides, "--dry-run")
    assert status == 2 and words in err and err.count("\n") == 1 and "internal error" not in err
    assert command(capsys, "train", config, *overrides)[::2] == (status, err)


def test_weights_that_only_a_variant_has(capsys, config, tmp_path):
    for extra in (["--dry-run"], []):
        status, _, err = command(capsys, "train", config, f"generator.pretrained={fp16_only(tmp_path / 'm')}", *extra)
        assert status == 2 and "transformer" in err and "generator.pretrained" in err
        shutil.rmtree(tmp_path / "m")


def test_what_passes_the_dry_run_starts(capsys, config, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("async def score(frames, prompt):\n    return 1.0\n")
    overrides = ["run.name=fine", f"rewards.mine.scorer={mine}:score"]
    status, out, err = command(capsys, "train", config, *overrides, "--dry-run")
    assert status == 0 and "all checks passed" in out, err
    with pytest.raises(Started):
        training.run_training(load_config(config, overrides), config)


@pytest.mark.parametrize(
    "changed, words",
    [
        ("step.takes=4", "step.takes was"),
        ("run.seed=7", "run.seed was"),
        ("run.name=other", "no run 'other'"),
        ("run.name=a/b", "run.name"),
    ],
)
def test_a_resume_is_checked_as_the_run_checks_it(capsys, config, changed, words):
    cfg = load_config(config, ["run.name=old"])
    run = RunDir(Path(cfg.run.dir) / "old")
    run.path.mkdir(parents=True)
    run.config.write_text(to_yaml(cfg))
    checkpoint.save(run.checkpoints, 1, {"w": torch.zeros(1)}, {}, {}, cfg, keep=1)
    base = ["train", config, "run.name=old", "--resume"]
    status, out, err = command(capsys, *base, "--dry-run")
    assert status == 0 and "from step 1" in out, err
    status, _, err = command(capsys, *base, changed, "--dry-run")
    assert status in (1, 2) and words in err and err.count("\n") == 1
    assert command(capsys, *base, changed)[::2] == (status, err)
