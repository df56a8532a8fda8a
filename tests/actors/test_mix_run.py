"""One's own takes and pictures of data in one run on a real local Ray, in one rollout call; it goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from labelled_table import pictures
from ray_run import Run, write_files

from pipeline.config.schema import Config
from pipeline.runs import checkpoint

pytestmark = pytest.mark.ray
STEPS = 3


def config(sd3: Path, root: Path) -> Config:
    return tiny.config(
        sd3,
        run={"dir": str(root / "runs"), "steps": STEPS},
        prompts={"train": root / "data", "heldout": root / "heldout.txt"},
        source={"name": "mix", "own": 1, "data": 1, "largest_error": 255},
        signal={"name": "select", "keep": 1},
        objective={"name": "awm"},
        step={"takes": 2, "groups": 4},
        rewards={"r": {"scorer": f"{root / 'rewards.py'}:brightness", "normalize": "running"}},
        rollout={"batch": 8},
        evaluation={"prompts": 2, "steps": 2, "batch": 2},
        optimizer={"lr": 1e-2, "ema_decay": 0.9},
        checkpoint={"every": 1, "keep": 9},
        tracking={"backends": []},
        ray={"address": "local", "init": {"num_cpus": 8, "object_store_memory": 200 * 2**20}},
    )


def test_own_takes_and_data_are_trained_together(cluster, tiny_sd3, tmp_path):
    root = write_files(tmp_path)
    (root / "data").mkdir()
    for name, data in zip(("a red circle", "b blue square", "c green circle"), pictures(3), strict=True):
        (root / "data" / f"{name[0]}.png").write_bytes(data)
        (root / "data" / f"{name[0]}.txt").write_text(name)
    cfg = config(tiny_sd3, root)
    whole = Run(cfg, "whole")
    outcome = whole.result()
    assert outcome["status"] == "finished" and outcome["groups"]["trained"] >= 4 * STEPS
    steps = [line for line in whole.metrics() if "loss" in line]
    assert len(steps) == STEPS and all({"reward/r", "grad_norm"} <= line.keys() for line in steps)
    assert any(line.get("onpolicy/max_abs_gap", 1) < 1e-5 for line in steps)
    assert "they are drawn one by one" not in whole.dir.log.read_text()
    resumed = Run(cfg, "resumed", checkpoint.folder_of(whole.dir.checkpoints, 1))
    assert resumed.result()["status"] == "finished"
    assert [line for line in resumed.metrics() if "loss" in line] == steps[1:]
    mine, theirs = resumed.tensors(STEPS), whole.tensors(STEPS)
    assert mine.keys() == theirs.keys() and all((mine[name] == theirs[name]).all() for name in mine)
