"""InstructVideo on a real local Ray: clips of data are encoded by the rollout workers, noised, denoised, decoded with
gradients in the learner; a resumed run goes on bit for bit, and a clip that breaks fails its group alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_rewards
from ray_run import Run, write_files

from pipeline.config.schema import Config
from pipeline.core.media import encode_mp4
from pipeline.runs import checkpoint

pytestmark = pytest.mark.ray
STEPS = 3


def write_clips(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, text in (("a", "a red circle"), ("b", "b blue square"), ("c", "c green circle")):
        (folder / f"{name}.mp4").write_bytes(encode_mp4(rng.integers(256, size=(5, 32, 32, 3), dtype=np.uint8), 8.0))
        (folder / f"{name}.txt").write_text(text)
    return folder


def config(wan: Path, root: Path, clips: Path, objective: dict | None = None, **sections) -> Config:
    reward = {"scorer": "clip_score", "args": {"model": str(root / "clip")}, "gradient": True, "segments": {"count": 2}}
    return tiny.config(
        wan,
        run={"dir": str(root / "runs"), "steps": STEPS},
        prompts={"train": clips, "heldout": root / "heldout.txt"},
        source={"name": "clips", "noise": 0.85, "largest_error": 255, **sections.pop("source", {})},
        signal={"name": "none"},
        objective=objective or {"name": "reward_gradient"},
        rewards={
            "r": reward,
            "watched": {"scorer": f"{root / 'rewards.py'}:brightness", "weight": 0},
        },
        step={"takes": 2, "groups": 1},
        evaluation={"prompts": 2, "steps": 2, "batch": 2},
        optimizer={"lr": 1e-2},
        checkpoint={"every": 1, "keep": 9},
        tracking={"backends": []},
        ray={"address": "local", "init": {"num_cpus": 8, "object_store_memory": 200 * 2**20}},
        **sections,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = write_files(tmp_path_factory.mktemp("clips-run"))
    tiny_rewards.clip(folder / "clip")
    (folder / "clips").mkdir()
    write_clips(folder / "clips")
    return folder


def test_a_run_learns_through_clips_and_goes_on_bit_for_bit(cluster, tiny_wan, root):
    cfg = config(tiny_wan, root, root / "clips")
    whole = Run(cfg, "whole")
    outcome = whole.result()
    assert outcome["status"] == "finished" and outcome["takes"] == 2 * STEPS
    steps = [line for line in whole.metrics() if "loss" in line]
    assert len(steps) == STEPS
    assert all(line["onpolicy/max_abs_tail_gap"] < 1e-5 and line["grad_norm"] > 0 for line in steps)
    assert all({"reward/r", "reward/watched"} <= line.keys() for line in steps)
    resumed = Run(cfg, "resumed", checkpoint.folder_of(whole.dir.checkpoints, 1))
    assert resumed.result()["status"] == "finished"
    assert [line for line in resumed.metrics() if "loss" in line] == steps[1:]
    mine, theirs = resumed.tensors(STEPS), whole.tensors(STEPS)
    assert mine.keys() == theirs.keys() and all((mine[name] == theirs[name]).all() for name in mine)


def test_a_run_on_the_clips_themselves_draws_nothing_and_goes_on_bit_for_bit(cluster, tiny_wan, root):
    """Ctrl-U: two neighbouring levels of clips with captions of their own, their rewards' gradients, no rollout."""
    objective = {"name": "one_step", "reward_steps": 3, "uncertainty": 1.0, "shape": "hinge", "target": 1.0}
    source = {"noise": 0.0, "distinct": True}
    cfg = config(tiny_wan, root, root / "clips", objective, source=source)
    whole = Run(cfg, "given")
    assert whole.result()["status"] == "finished"
    steps = [line for line in whole.metrics() if "loss" in line]
    assert len(steps) == STEPS and all(line["denoising"] > 0 and line["grad_norm"] > 0 for line in steps)
    assert any("reward/r" in line and line["uncertainty"] > 0 for line in steps)
    resumed = Run(cfg, "given-resumed", checkpoint.folder_of(whole.dir.checkpoints, 2))
    assert resumed.result()["status"] == "finished"
    assert [line for line in resumed.metrics() if "loss" in line] == steps[2:]
    mine, theirs = resumed.tensors(STEPS), whole.tensors(STEPS)
    assert mine.keys() == theirs.keys() and all((mine[name] == theirs[name]).all() for name in mine)


def test_a_clip_that_breaks_fails_its_group_and_the_run_goes_on(cluster, tiny_wan, root):
    clips = root / "breaking"
    shutil.copytree(root / "clips", clips)
    damaged = bytearray((clips / "b.mp4").read_bytes())
    at = damaged.find(b"mdat") + 800
    damaged[at : at + 2000] = b"\xff" * 2000  # known only when it is decoded
    (clips / "b.mp4").write_bytes(damaged)
    run = Run(config(tiny_wan, root, clips, faults={"max_attempts": 1}), "breaking")
    outcome = run.result()
    assert outcome["status"] == "finished" and outcome["groups"]["failed"] >= 1
    assert outcome["groups"]["trained"] == STEPS
    log = run.dir.log.read_text()
    assert f"{clips / 'b.mp4'}: " in log and "the group has failed" in log and "replacing rollout" not in log
