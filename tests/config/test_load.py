"""Configs: defaults, overrides, and one clear line for every mistake."""

from pathlib import Path

import pytest
import yaml

from pipeline.config.load import load_config, to_yaml
from pipeline.config.old_keys import RENAMED, REPLACED
from pipeline.config.reference import REQUIRED, Keys, leaves
from pipeline.config.resources import WorkerRange
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.tools.config_docs import config_docs

ROOT = Path(__file__).parents[2]
GOOD = """
generator:
  pretrained: models/x
prompts:
  train: train.txt
rewards:
  jpeg:
    scorer: jpeg_compressibility
"""


def write(tmp_path, text=GOOD, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_and_overrides(tmp_path):
    config = load_config(
        write(tmp_path),
        [
            "run.steps=7",
            "optimizer.lr=3e-4",
            "rewards.extra.scorer=jpeg_incompressibility",
            "rewards.extra.args.scale=1e2",
            "generator.call_kwargs.max_sequence_length=64",
            "trainable.targets=[to_q, to_k]",
            "run.name=007",
        ],
    )
    assert config.run.steps == 7 and config.optimizer.lr == 3e-4
    assert config.rewards["extra"].args == {"scale": 100.0}
    assert config.generator.call_kwargs == {"max_sequence_length": 64}
    assert config.trainable.targets == ["to_q", "to_k"]
    assert config.run.name == "007"


def test_another_part_brings_its_own_options(tmp_path):
    path = write(tmp_path, GOOD + "objective: {name: grpo, clip_low: 0.2, kl_beta: 0.5}\n")
    assert load_config(path).objective.model_dump() == {
        "name": "grpo", "clip_low": 0.2, "clip_high": 1e-4, "kl_beta": 0.5, "kl_every": 1,
        "stale": "reweigh", "max_weight": 2.0, "reject_above": 0.0, "step_weight": "none",
    }  # fmt: skip
    for overrides in (["objective.kl_beta=0.1", "objective.name=awm"], ["objective.name=awm", "objective.kl_beta=0.1"]):
        assert load_config(path, overrides).objective.model_dump() == {"name": "awm", "kl_beta": 0.1, "kl_every": 1}
    assert load_config(path, ["objective.name=grpo"]).objective.clip_low == 0.2
    message = error_of(path, "objective.name=awm", "objective.clip_low=0.1")
    assert message.startswith("override: objective.clip_low: awm has no such option")


def test_yaml_round_trip(tmp_path):
    config = load_config(write(tmp_path), ["optimizer.lr=1e-5", "rewards.jpeg.args.scale=1e-3"])
    again = load_config(write(tmp_path, to_yaml(config), "resolved.yaml"))
    assert again == config


def test_workers_and_resources(tmp_path):
    path = write(tmp_path)
    config = load_config(path, ["rollout.workers=3", "rewards.jpeg.workers={min: 2, max: 5}"])
    assert config.rollout.workers == WorkerRange(3, 3) and config.rewards["jpeg"].workers == WorkerRange(2, 5)
    assert load_config(path, ["rollout.workers.max=4"]).rollout.workers == WorkerRange(1, 4)
    pinned = load_config(path, ["rollout.resources.rushes_rollout=0.01", "learner.resources={CPU: 2, GPU: 1}"])
    assert pinned.rollout.resources == {"CPU": 0.5, "rushes_rollout": 0.01}  # what is not given keeps its default
    assert pinned.learner.resources == {"CPU": 2.0, "GPU": 1.0} and config.learner.resources == {"CPU": 0.5}
    again = load_config(write(tmp_path, to_yaml(config), "resolved.yaml"))
    assert again == config and "workers: 3\n" in to_yaml(config)


@pytest.mark.parametrize(
    "override, parts",
    [
        ("step.takess=4", ["step.takess", "unknown key", "did you mean step.takes?"]),
        ("lr=1", ["lr: unknown key", "optimizer.lr"]),
        ("run.steps=abc", ["run.steps", "'abc'", "whole number >= 1"]),
        ("run.steps=0", ["run.steps", "found 0", ">= 1"]),
        ("run.steps=2.5", ["run.steps", "2.5", "whole number"]),
        ("run.steps=true", ["run.steps", "found true"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "inf"]),
        ("optimizer.lr=", ["optimizer.lr", "nothing (null)", "number > 0"]),
        ("trainable.targets=3", ["trainable.targets", "found 3", "list of (text) or auto"]),
        ("trainable.targets=[1]", ["trainable.targets", "list of (text)"]),
        ("rewards.jpeg.segments.count=0", ["rewards.jpeg.segments.count", "whole number >= 1"]),
        ("rewards.jpeg.wieght=1", ["rewards.jpeg.wieght", "did you mean rewards.jpeg.weight?"]),
        ("rewards.other.weight=1", ["rewards.other.scorer", "is missing"]),
        ("rewards={}", ["rewards: found none", "at least one"]),
        ("rewards=[a]", ["rewards", "a list"]),
        ("run=5", ["run: found 5", "section", "steps"]),
        ("run.steps.more=5", ["override: run.steps: found a mapping"]),
        ("sampler.steps=1", ["sampler.steps", "use 2 or more"]),
        ("run.steps", ["key=value"]),
        ("run.steps=[1", ["not valid YAML"]),
        ("rewards.jpeg.weight=0", ["every weight is 0"]),
        ("objective.kl_bta=3", ["objective.kl_bta: grpo has no such option", "did you mean objective.kl_beta?"]),
        ("objective.kl_beta=-1", ["override: objective.kl_beta: found -1", "number >= 0"]),
        ("objective.kl_beta=true", ["objective.kl_beta: found true"]),
        ("objective.clip_low=", ["objective.clip_low: found nothing (null)"]),
        ("objective.name=gpro", ["objective.name: found 'gpro'", "did you mean grpo?"]),
        ("objective=grpo", ["objective: found 'grpo'", "write objective: {name: …}"]),
        ("source.name=file", ["source.name: found 'file'", "rollout"]),
        ("algorithm.kl_beta=1", ["algorithm.kl_beta: is now objective.kl_beta"]),
        ("objective.kl_every=3", ["objective.kl_every: 3", "set objective.kl_beta above 0"]),
        ("rollout.workers=0", ["rollout.workers: found 0", "whole number >= 1, or {min: 1, max: 4}"]),
        ("rollout.workers=true", ["rollout.workers: found true"]),
        ("rollout.workers={mix: 1, max: 2}", ["rollout.workers: found {'mix': 1, 'max': 2}"]),
        ("rollout.workers.min=2", ["rollout.workers: found {'min': 2}"]),
        ("rewards.jpeg.workers={min: 3, max: 2}", ["rewards.jpeg.workers: min 3 is above max 2", "swap them"]),
        ("learner.resources={gpu: 1}", ["learner.resources: unknown resource 'gpu'", "did you mean GPU?"]),
        ("learner.num_gpus=1", ["learner.num_gpus: unknown key", "did you mean learner.resources.GPU?"]),
        ("rollout.resources.rushes_rolout=1", ["rushes_rolout", "did you mean rushes_rollout?"]),
        ("rollout.resources.GPU=-1", ["rollout.resources: GPU: found -1", "number >= 0"]),
        ("rollout.resources.GPU=1.5", ["rollout.resources: GPU: found 1.5", "whole number"]),
        ("rollout.resources=2", ["rollout.resources: found 2", "{CPU: 1, GPU: 0.5}"]),
        ("tracking.backends=[tensorbord]", ["tracking.backends", "tensorboard"]),
        ("rewards.jpeg.clip=[2, 1]", ["rewards.jpeg.clip: found [2.0, 1.0]", "below the second"]),
        ("rewards.jpeg.clip=[2]", ["rewards.jpeg.clip", "expected list of 2 (number) or null"]),
        ("optimizer.betas=[0.9, 1]", ["optimizer.betas", "list of 2 (number >= 0 and < 1)"]),
        ("sampler.window.range=[0, 12]", ["sampler.window.range", "12", "outside 1..9"]),
        ("sampler.window.range=[5, 5]", ["sampler.window.range: the first step, 5, must be below the end, 5"]),
    ],
)
def test_every_wrong_override_is_one_clear_line(tmp_path, override, parts):
    message = error_of(write(tmp_path), override)
    for part in parts:
        assert part in message, message


def test_what_a_key_accepts_is_typed():
    keys = {leaf.path: leaf for leaf in leaves()}
    assert {path for path, leaf in keys.items() if leaf.text_only} >= {
        "run.name",
        "run.dir",
        "prompts.train",
        "ray.address",
    }
    assert not keys["trainable.targets"].text_only and not keys["run.steps"].text_only
    assert keys["rollout.workers"].numeric and keys["rewards.*.segments.aggregate"].numeric
    assert not keys["generator.compile"].numeric and not keys["rollout.resources"].numeric
    assert keys["rewards.*.segments.aggregate"].choices == ("mean", "min")
    assert keys["tracking.backends"].choices == ("tensorboard", "wandb", "mlflow")


def test_every_old_key_is_refused_with_what_to_write_instead(tmp_path):
    path = write(tmp_path)
    for old in (*RENAMED, *REPLACED):
        message = error_of(path, f"{old.replace('*', 'jpeg')}=1")
        assert message.startswith(f"override: {old.replace('*', 'jpeg')}: is ") and "did you mean" not in message
    assert error_of(path, "learner.lanes=2") == "override: learner.lanes: is now learner.replicas"
    assert error_of(path, "rewards.jpeg.repeats=2").endswith("is now rewards.jpeg.score_repeats")
    assert "write ray.init: {num_cpus: 8}" in error_of(path, "ray.num_cpus=4")
    message = error_of(write(tmp_path, GOOD + "takes: {every: 5}\n"))
    assert message.endswith("run.yaml:9: takes.every: is now tracking.save_takes_every")
    keys = {leaf.path for leaf in Keys({}).leaves}
    assert not keys & {*RENAMED, *REPLACED} and set(RENAMED.values()) <= keys


def test_arguments_of_a_local_ray(tmp_path):
    path = write(tmp_path)
    ray = load_config(path).ray
    assert (ray.num_cpus, ray.object_store_memory, ray.dashboard_port) == (None, 512 * 2**20, None)
    ray = load_config(path, ["ray.init={num_cpus: 4, object_store_memory: 83886080, _temp_dir: /x}"]).ray
    assert (ray.num_cpus, ray.object_store_memory, ray.init["_temp_dir"]) == (4, 80 * 2**20, "/x")
    assert "ray.init: dashboard_port: found 80; expected a whole number >= 1024 and <= 65535" in error_of(
        path, "ray.init.dashboard_port=80"
    )
    assert "ray.init: num_cpus: found True" in error_of(path, "ray.init.num_cpus=true")
    assert "ray.init: object_store_memory: found 512" in error_of(path, "ray.init.object_store_memory=512")
    assert "ray.init: address is set by Rushes (ray.address); leave it out" in error_of(path, "ray.init.address=auto")


def test_queues_hold_a_call_per_worker(tmp_path):
    assert load_config(write(tmp_path)).rollout.queue_capacity == 8
    assert load_config(write(tmp_path), ["rollout.workers={min: 2, max: 40}"]).rollout.queue_capacity == 40


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ["is empty"]),
        ("- a\n- b\n", ["holds a list", "mapping of sections"]),
        ("run:\n\tsteps: 1\n", [":2:1", "not valid YAML", "tabs"]),
        ("run: {steps: 1\n", ["not valid YAML"]),
        (GOOD + "run:\n  steps: 1\n  steps: 2\n", [":11", "run.steps is given twice", "line 10"]),
        (GOOD + "run: {}\nrun: {}\n", ["run is given twice"]),
        (GOOD.replace("pretrained", "pretraind"), [":3", "did you mean generator.pretrained?"]),
        (GOOD.replace("generator:\n  pretrained: models/x\n", ""), ["generator: this section is missing"]),
        ("rewards: {}\n" + GOOD.split("rewards")[0], [":1", "rewards: found none"]),
        (GOOD + "run: {steps: x}\n", [":9", "run.steps", "'x'"]),
        ("a: !!python/object:os.system {}\n", ["not valid YAML"]),
        (GOOD + "? [1, 2]\n: 3\n", ["key must be plain text"]),
        (GOOD + "7: 3\n", ["key 7 must be text"]),
    ],
)
def test_every_wrong_file_is_one_clear_line(tmp_path, text, parts):
    path = write(tmp_path, text)
    message = error_of(path)
    assert "run.yaml" in message
    for part in parts:
        assert part in message, message


def test_file_errors(tmp_path):
    write(tmp_path, name="quickstart.yaml")
    assert "did you mean quickstart.yaml?" in error_of(tmp_path / "quikstart.yaml")
    assert "is a folder" in error_of(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in error_of(tmp_path / "binary.yaml")


def test_relative_paths_are_looked_up_beside_the_config(tmp_path):
    (tmp_path / "train.txt").write_text("a")
    (tmp_path / "mine.py").write_text("")
    config = load_config(write(tmp_path), ["rewards.jpeg.scorer=mine.py:score"])
    assert config.prompts.train == tmp_path / "train.txt"
    assert config.rewards["jpeg"].scorer == f"{tmp_path / 'mine.py'}:score"


def test_reward_file_in_the_working_directory_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    Path("mine.py").write_text("")
    config = load_config(write(tmp_path), ["rewards.jpeg.scorer=mine.py:score"])
    assert config.rewards["jpeg"].scorer == f"{tmp_path / 'cwd' / 'mine.py'}:score"


def test_schema_is_small_and_described():
    assert len(leaves()) <= 100
    assert all(leaf.description for leaf in leaves())
    defaults = {leaf.path: leaf.default for leaf in leaves()}
    assert defaults["tracking.backends"] == ["tensorboard"] and defaults["generator.pretrained"] is REQUIRED


def test_docs_are_current():
    assert (ROOT / "docs/config.md").read_text("utf-8") == config_docs(), (
        "stale; run: rushes config --docs > docs/config.md"
    )


def test_every_key_is_read_by_something():
    sources = "\n".join(
        p.read_text("utf-8")
        for folder in ("pipeline", "actors", "jobs")
        for p in (ROOT / folder).rglob("*.py")
        if p.parent.name != "config"
    )
    unread = [leaf.path for leaf in leaves() if f".{leaf.path.rsplit('.', 1)[-1]}" not in sources]
    assert not unread, f"nothing reads {unread}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid(path):
    assert isinstance(load_config(path), Config)
    assert yaml.safe_load(path.read_text())


@pytest.mark.parametrize("key", ["run.dir", "generator.embedding_cache", "rewards.jpeg.args.x", "prompts.train"])
def test_a_nul_character_is_refused_wherever_it_stands(tmp_path, key):
    """No file system takes one: each reader would fail in its own way, deep inside the run."""
    assert f"{key}: holds a NUL character" in error_of(write(tmp_path), f'{key}="a\\0b"')
