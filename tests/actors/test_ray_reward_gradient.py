"""A run that learns through a reward, on a real local Ray: training groups need no server, evaluation has one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
import tiny_rewards
from ray_run import Run, make_config, write_files

from pipeline.config.schema import Config
from pipeline.core.takes_table import read_takes
from pipeline.runs import checkpoint

pytestmark = pytest.mark.ray

STEPS = 10  # of a few tenths of a second each: a stop is asked for after the first, and has to come before the last


@pytest.fixture(scope="module")
def cfg(tiny_sd3, tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("through")
    made = make_config(
        tiny_sd3,
        write_files(folder),
        folder / "runs",
        run={"steps": STEPS},
        objective={"name": "reward_gradient", "tail": [1, 3], "kl_beta": 0.1, "anchor": 1.0},
        signal={"name": "none"},
        step={"takes": 1, "groups": 3},
        tracking={"save_takes_every": 1},
    )
    rewards = {
        "clip": {
            "scorer": "clip_score",
            "args": {"model": str(tiny_rewards.clip(folder / "clip"))},
            "gradient": True,
        },
        "watched": {"scorer": made.rewards["own"].scorer, "weight": 0},
    }
    return Config.model_validate({**made.model_dump(mode="json"), "rewards": rewards})


@pytest.fixture(scope="module")
def undisturbed(cluster, cfg) -> Run:
    run = Run(cfg, "whole")
    run.outcome = run.result()
    return run


def test_training_takes_are_judged_in_the_learner_and_evaluations_on_a_server(undisturbed):
    run, outcome = undisturbed, undisturbed.outcome
    assert outcome["status"] == "finished" and outcome["groups"]["trained"] == outcome["takes"] == 3 * STEPS
    steps = [line for line in run.metrics() if "loss" in line]
    assert len(steps) == STEPS and all(line["onpolicy/max_abs_tail_gap"] < 1e-5 for line in steps)
    assert all(line["reward/clip"] == line["reward/mean"] != 0 and line["reward/watched"] > 0 for line in steps)
    assert steps[2]["kl"] > 0
    first, *_, last = run.evals()
    assert {"clip", "watched"} <= first["rewards"].keys() and last["rewards"]["clip"]["mean"] > first["mean"]
    table = read_takes(run.dir.train_takes(1))
    assert len(table) == 3 and all(row["reward/watched"] > 0 and row["reward"] is None for row in table)


def test_it_is_resumed_bit_for_bit(undisturbed, cfg):
    run = Run(cfg, "resumed")
    run.until(lambda snapshot: snapshot["step"] >= 1)
    ray.get(run.controller.stop.remote())
    stopped = run.result()
    assert stopped["status"] == "stopped" and 1 <= stopped["step"] < STEPS
    resumed = Run(cfg, "resumed", Path(stopped["checkpoint"]))
    assert resumed.result()["status"] == "finished"
    mine, theirs = resumed.tensors(STEPS), undisturbed.tensors(STEPS)
    assert mine.keys() == theirs.keys() and any(name.startswith("start/") for name in mine)
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert resumed.metrics() == undisturbed.metrics() and resumed.evals() == undisturbed.evals()
    assert checkpoint.latest(resumed.dir.checkpoints) is not None


def test_without_held_out_prompts_no_server_is_started(cluster, cfg):
    alone = cfg.model_copy(
        update={
            "rewards": {"clip": cfg.rewards["clip"]},
            "prompts": cfg.prompts.model_copy(update={"heldout": None}),
            "run": cfg.run.model_copy(update={"steps": 1}),
        }
    )
    run = Run(alone, "alone")
    snapshot = run.until(lambda state: state["step"] >= 1)
    assert set(snapshot["pools"]) == {"rollout"} and run.result()["status"] == "finished"
