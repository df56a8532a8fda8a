"""Reward servers on a real local Ray: shared calls, poison, death in a shared call, health, own environments."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from ray_run import REWARDS, Run, make_config
from score_work import score_work

from actors import ray_options
from actors.ray_options import RunContext, merged_env, to_bytes
from actors.reward_server import RewardServer
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import RewardError
from pipeline.core.types import Media, PromptItem

pytestmark = pytest.mark.ray

MORE = """
import os, pathlib

def crowded(frames, prompts):
    scar = pathlib.Path(__file__).with_suffix(".scar")
    if len(prompts) > 4 and not scar.exists():
        scar.touch()
        os._exit(3)
    time.sleep(0.05)
    if any("green circle" in prompt for prompt in prompts):
        raise ValueError("no green circles")
    return {"score": brightness(frames, prompts), "together": np.full(len(prompts), len(prompts))}

def wears_out(frames, prompts):
    wears_out.left -= 1
    if wears_out.left < 0:
        raise MemoryError("worn out")
    return brightness(frames, prompts)

wears_out.left = 2
for function in (crowded, wears_out):
    function.batched = True
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.txt").write_text("a red circle\nb blue square\nc green circle\na blue circle\nb red square\n")
    (folder / "rewards.py").write_text(REWARDS + MORE)
    return folder


def shared(cfg, **reward):
    """The config with its one reward's servers taking several groups a call."""
    own = cfg.rewards["own"].model_copy(update={"batch_items": 64, **reward})
    return cfg.model_copy(update={"rewards": {"own": own}})


def test_in_shared_calls_a_death_costs_no_attempt_and_poison_fails_only_its_own(cluster, tiny_sd3, files, tmp_path):
    """The first shared call ends its server; in later ones a green circle raises. Nobody has a second attempt."""
    cfg = make_config(
        tiny_sd3,
        files,
        tmp_path,
        "crowded",
        run={"steps": 3},
        prompts={"heldout": None},
        step={"groups": 3},
        rollout={"batch": 12},  # three groups at once, which then wait for their scores together
        faults={"max_attempts": 1},
    )
    run = Run(shared(cfg), "crowded")
    outcome = run.result()
    assert outcome["status"] == "finished" and outcome["groups"]["trained"] == 9
    log = run.dir.log.read_text()
    assert "they are scored one by one" in log and log.count("replacing reward.own-0") == 1
    failed = [line for line in log.splitlines() if re.search(r"group=\d+ rushes.dispatcher: scoring failed", line)]
    assert len(failed) == outcome["groups"]["failed"] >= 1
    assert outcome["groups"]["admitted"] == 9 + len(failed) and outcome["groups"]["filtered"] == 0
    assert all("reward own: take 0: " in line and "no green circles" in line for line in failed)
    assert max(line.get("reward/own/together", 0) for line in run.metrics()) > 4  # a group has 4 takes


def server(cfg, tmp_path, name="own"):
    """A reward server, started as a pool starts it."""
    ctx = RunContext(cfg=cfg, run_path=str(tmp_path), cwd=os.getcwd())
    env = merged_env(cfg.rewards[name].runtime_env, threads=1)
    actor = ray.remote(RewardServer).options(num_cpus=0.1, runtime_env=env).remote(ctx, f"reward.{name}-0")
    ray.get(actor.start.remote(name, [PROMPT]))
    return actor


PROMPT = PromptItem(index=0, text="a red circle")


def ask(actor, *levels):
    """Outcomes of one call with a group of one take per level."""
    works = [score_work(i, [PROMPT]) for i in range(len(levels))]
    media = [Media(frames=np.full((1, 1, 4, 4, 3), level, np.uint8), fps=1.0) for level in levels]
    return ray.get(actor.score.remote(to_bytes(works), *media))


def test_a_server_that_no_longer_scores_what_it_did_is_given_up(cluster, tiny_sd3, files, tmp_path):
    actor = server(make_config(tiny_sd3, files, tmp_path, "wears_out"), tmp_path)  # the start takes one score
    assert ask(actor, 51)[0].values.tolist() == [pytest.approx(0.2)]
    with pytest.raises(ray.exceptions.RayTaskError, match="no longer scores what it scored at its start"):
        ask(actor, 51)
    ray.kill(actor)
    actor = server(make_config(tiny_sd3, files, tmp_path, "broken"), tmp_path)  # fails from the start: its input's
    assert isinstance(ask(actor, 51)[0], RewardError)
    ray.kill(actor)


def environment(folder: Path, version: int) -> Path:
    """A virtual environment that sees this one's packages, and a package `tinypin` of this version."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()))
    (packages / "tinypin.py").write_text(f"VERSION = {version}\n")
    return folder / "bin" / "python"


def test_two_scorers_with_conflicting_pins_side_by_side(cluster, tiny_sd3, files, tmp_path):
    own = tmp_path / "pinned.py"
    own.write_text(
        "import os, tinypin\ndef score(frames, prompt):\n    return tinypin.VERSION + float(os.environ['PLUS'])\n"
    )
    cfg = make_config(tiny_sd3, files, tmp_path)
    rewards = {}
    for version in (1, 2):
        python = environment(tmp_path / f"env{version}", version)
        env = {"py_executable": str(python), "env_vars": {"PLUS": "0.5"}}
        rewards[f"v{version}"] = RewardConfig(scorer=f"{own}:score", runtime_env=env)
    cfg = cfg.model_copy(update={"rewards": rewards})
    servers = [server(cfg, tmp_path, name) for name in rewards]
    assert [ask(actor, 1)[0].values.tolist() for actor in servers] == [[1.5], [2.5]]
    for actor in servers:
        ray.kill(actor)


def test_variables_of_a_runtime_environment_win_over_ours(monkeypatch):
    env = merged_env({"env_vars": {"OMP_NUM_THREADS": "7"}}, threads=2)
    assert env["env_vars"]["OMP_NUM_THREADS"] == "7" and env["env_vars"]["MKL_NUM_THREADS"] == "2"
    assert "PYTHONPATH" not in env["env_vars"]
    assert merged_env({"py_executable": "envs/a/bin/python"}, 1)["py_executable"] == f"{os.getcwd()}/envs/a/bin/python"
    assert merged_env({"py_executable": "/a/python"}, 1)["env_vars"]["PYTHONPATH"] == str(Path(__file__).parents[2])
    monkeypatch.setattr(ray_options, "PROJECT", Path("/env/lib/python3.11/site-packages"))  # installed, not editable
    assert "PYTHONPATH" not in merged_env({"py_executable": "/a/python"}, 1)["env_vars"]
