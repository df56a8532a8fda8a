"""Each thing that can be wrong before a model is loaded, found by its files alone."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
from fake_checkpoint import fake_config

from pipeline.core.errors import ConfigError, InputError, RushesError
from pipeline.generators.checkpoint_files import check_safetensors, is_local
from pipeline.tools import preflight, preflight_machine


def error_of(cfg):
    with pytest.raises((ConfigError, InputError)) as caught:
        preflight.check_all(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_config_passes_and_reports(tmp_path):
    result = preflight.check_all(fake_config(tmp_path))
    assert len(result.train) == 2 and len(result.heldout) == 1 and "transformer" in result.components
    assert 0 < result.disk_needed < result.disk_free
    assert list((tmp_path / "runs").iterdir()) == []


def test_no_torch_is_imported(tmp_path):
    code = (
        "import sys, pathlib; sys.path[:0] = ['.', 'tests/support']; from fake_checkpoint import fake_config;"
        "from pipeline.tools.preflight import check_all; check_all(fake_config(pathlib.Path(sys.argv[1])));"
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == 0


def weights(root):
    return root / "model" / "transformer" / "diffusion_pytorch_model.safetensors"


def cut(root):
    weights(root).write_bytes(weights(root).read_bytes()[:-100])


def lengthen(root):
    weights(root).write_bytes(weights(root).read_bytes() + b"x")


def garbage(root):
    weights(root).write_bytes(b"\xff" * 4000)


def bad_header(root):
    data = bytearray(weights(root).read_bytes())
    data[10:20] = b"\x00" * 10
    weights(root).write_bytes(data)


def lfs(root):
    weights(root).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")


def pickled(root):
    weights(root).rename(weights(root).with_suffix(".bin"))


def missing_shard(root):
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "part-2.safetensors"}}
    (root / "model/transformer/x.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "spoil, parts",
    [
        (cut, ["transformer/diffusion_pytorch_model.safetensors", "header states", "copy it again"]),
        (lengthen, ["header states"]),
        (garbage, ["not a complete safetensors file"]),
        (bad_header, ["safetensors header: is not"]),
        (lfs, ["git lfs pull"]),
        (pickled, ["pickle", "safe_serialization"]),
        (missing_shard, ["part-2.safetensors", "missing"]),
        (lambda r: weights(r).unlink(), ["no .safetensors weights"]),
        (lambda r: shutil.rmtree(r / "model/vae"), ["vae", "folder is missing"]),
        (lambda r: (r / "model/vae/config.json").unlink(), ["vae/config.json", "is missing"]),
        (lambda r: (r / "model/scheduler/scheduler_config.json").write_text("{"), ["scheduler_config.json", "JSON"]),
        (lambda r: (r / "model/model_index.json").unlink(), ["no model_index.json", "save_pretrained"]),
        (lambda r: (r / "model/model_index.json").write_text("[]"), ["model_index.json", "object"]),
        (lambda r: (r / "model/model_index.json").write_text("{}"), ["_class_name"]),
        (lambda r: shutil.rmtree(r / "model"), ["no such folder", "hub id"]),
    ],
)
def test_spoilt_generators_are_named(tmp_path, spoil, parts):
    cfg = fake_config(tmp_path)
    spoil(tmp_path)
    message = error_of(cfg)
    for part in ["generator.pretrained", *parts]:
        assert part in message, message


@pytest.mark.parametrize(
    "sections, parts",
    [
        ({"generator": {"height": 50}}, ["generator.height: found 50", "multiple of 16", "48 or 64"]),
        ({"generator": {"num_frames": 8}}, ["generator.num_frames: found 8", "4 n + 1", "5 or 9"]),
        ({"generator": {"fps": 1000}}, ["generator.fps"]),
        ({"sampler": {"kind": "ddim"}}, ["sampler.kind: ddim", "flow_sde"]),
        ({"sampler": {"kind": "flow_sd"}}, ["sampler.kind", "'flow_sd'", "dance_sde", "did you mean flow_sde?"]),
        ({"sampler": {"kind": "ode"}}, ["sampler.kind: found 'ode'", "one of flow_sde, dance_sde, cps"]),
        (
            {"objective": {"name": "grpo_guard"}, "sampler": {"kind": "cps"}},
            ["objective.name: grpo_guard needs sampler.kind flow_sde or dance_sde"],
        ),
        (
            {"objective": {"name": "awm"}, "step": {"updates": 2}},
            ["step.updates: found 2", "awm allows at most 1"],
        ),
        (
            {"objective": {"name": "awm"}, "sampler": {"same_initial_noise": True}},
            ["sampler.same_initial_noise: must be false with objective awm"],
        ),
        ({"rewards": {"a": {"scorer": "jpeg_compresibility"}}}, ["rewards.a", "did you mean jpeg_compressibility?"]),
        ({"rewards": {"a": {"scorer": "nothing.py:score"}}}, ["rewards.a", "nothing.py is not there"]),
        (
            {"rewards": {"a": {"scorer": "jpeg_compressibility", "args": {"q": 1}}}},
            ["rewards.a.args.q", "no such option"],
        ),
        ({"tracking": {"backends": ["mlflow"]}}, ["tracking.backends: mlflow", "pip install 'rushes[mlflow]'"]),
        ({"learner": {"device": "gpu"}}, ["learner.device: found 'gpu'", "cuda"]),
        ({"learner": {"resources": {"CPU": 9}}}, ["ray.init.num_cpus", "reserve 9.6 CPUs", "has 4"]),
        ({"rollout": {"workers": {"min": 1, "max": 9}}}, ["ray.init.num_cpus", "reserve 5.1 CPUs", "has 4"]),
        ({"learner": {"resources": {"bigmem": 1}}}, ["resources.bigmem", "announces no such", "rushes_learner"]),
        ({"prompts": {"heldout": None}, "evaluation": {"every": 5}}, ["evaluation.every", "prompts.heldout"]),
        (
            {"sampler": {"window": {"kind": "sliding", "every": 500}}},
            ["sampler.window.every: 500", "never moves"],
        ),
    ],
)
def test_wrong_configs_are_named(tmp_path, sections, parts):
    message = error_of(fake_config(tmp_path, **sections))
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("scheduler, wanted", [("DDPMScheduler", "ddim"), ("LCMScheduler", "lcm")])
def test_epsilon_models_need_their_own_sampler(tmp_path, scheduler, wanted):
    cfg = fake_config(tmp_path)
    index = tmp_path / "model/model_index.json"
    index.write_text(index.read_text().replace("FlowMatchEulerDiscreteScheduler", scheduler))
    (tmp_path / "model/scheduler/scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    assert f"use {wanted}" in error_of(cfg)


def test_missing_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight_machine, "gpu_count", lambda: 0)
    assert "learner.device: found cuda, but torch" in error_of(fake_config(tmp_path, learner={"device": "cuda"}))
    assert "reserve 1 GPUs" in error_of(fake_config(tmp_path, learner={"resources": {"GPU": 1}}))
    monkeypatch.setattr(preflight_machine, "gpu_count", lambda: 2)
    assert "only 2 GPUs" in error_of(fake_config(tmp_path, rollout={"device": "cuda:2"}))


def test_overlap_of_train_and_heldout(tmp_path):
    cfg = fake_config(tmp_path)
    (tmp_path / "heldout.txt").write_text("new\n\na blue cross\n")
    message = error_of(cfg)
    assert "heldout.txt, line 3" in message and "train.txt, line 2" in message and "remove it" in message


def test_a_prompt_that_asks_for_a_reward_that_is_not_there(tmp_path):
    cfg = fake_config(tmp_path)
    rows = [{"prompt": "a red cube"}, {"prompt": "a blue cube", "metadata": {"rewards": ["jpg"]}}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = cfg.prompts.model_copy(update={"train": path})
    message = error_of(cfg.model_copy(update={"prompts": prompts}))
    assert message.startswith(f"prompts.train: {path}, line 2: metadata.rewards: the config has no reward 'jpg'")


def test_taken_dashboard_port(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = error_of(fake_config(tmp_path, ray={"init": {"dashboard_port": port}}))
    assert (
        f"ray.init.dashboard_port: port {port} is taken" in message and f"ray.init.dashboard_port={port + 1}" in message
    )


def test_run_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    message = error_of(fake_config(tmp_path, run={"dir": str(tmp_path / "file" / "runs")}))
    assert "run.dir: cannot write" in message and "file stands where a folder is needed" in message


def test_too_little_disk(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(100, 99, 1 << 20)
    monkeypatch.setattr(preflight_machine.shutil, "disk_usage", lambda _: usage)
    assert "1 MiB free" in error_of(fake_config(tmp_path))


def test_video_scorers_need_videos(tmp_path):
    cfg = fake_config(tmp_path, generator={"num_frames": 1}, rewards={"m": {"scorer": "motion"}})
    assert "judges motion" in error_of(cfg)
    judged = {"j": {"scorer": "vlm_judge", "args": {"base_url": "http://127.0.0.1:1/v1", "model": "m"}}}
    preflight.check_rewards(fake_config(tmp_path / "x", generator={"num_frames": 1}, rewards=judged))


@pytest.mark.parametrize("name", ["mean", "std", "se", "a/b", "", "a b", "x" * 65, "../up", "naïve"])
def test_names_that_no_reward_can_have(tmp_path, name):
    """`reward/mean` is the mean of all rewards; a name stands in metrics, columns and actors' names."""
    assert "rewards." in error_of(fake_config(tmp_path, rewards={name: {"scorer": "jpeg_compressibility"}}))


def test_relative_rewards_see_all_takes_of_a_prompt_together(tmp_path):
    (tmp_path / "own.py").write_text("def better(a, b, prompt):\n    return 0.5\n")
    reward = {"t": {"scorer": "tournament", "args": {"judge": f"{tmp_path}/own.py:better"}}}
    for number, (takes, batch, message) in enumerate(
        ((1, 16, "evaluation.takes_per_prompt: rewards.t"), (3, 16, "such as 15"), (3, 15, None), (4, 2, "such as 4"))
    ):
        evaluation = {"takes_per_prompt": takes, "batch": batch}
        cfg = fake_config(tmp_path / str(number), rewards=reward, evaluation=evaluation)
        if message is None:
            preflight.check_rewards(cfg)
        else:
            assert message in error_of(cfg)


def test_hub_ids_pass():
    assert not is_local("stabilityai/stable-diffusion-3.5-medium")
    assert is_local("/data/model") and is_local("./a/b") and is_local("models") and is_local("a/b/c")


def test_safetensors_header_is_returned(tmp_path):
    fake_config(tmp_path)
    assert check_safetensors(weights(tmp_path))["weight"]["shape"] == [64, 64]
    with pytest.raises(RushesError, match="no such file"):
        check_safetensors(tmp_path / "missing.safetensors")
