"""What a run keeps in memory: an evaluation lets go of its version, the metrics of old steps go."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny

from actors.evaluation import Evaluator
from actors.group_run import GroupFailed, GroupRun, GroupState
from actors.ray_options import RunContext
from actors.step_recorder import Recent
from pipeline.core.errors import RunFailed
from pipeline.core.types import Media, PolicyVersion, PromptItem, RewardScores, RolloutMeta
from pipeline.rewards.guards import measure
from pipeline.runs.snapshot import EvaluationProgress

PROMPTS = [PromptItem(index=i, text=f"prompt {i}") for i in range(4)]


class Weights:
    """Stands for a reference to the weights in the object store."""


class Runner:
    """Draws and scores at once, or fails what it is told to."""

    grid = None

    def __init__(self, failing: bool = False) -> None:
        self.failing = failing

    async def room(self) -> None:
        return

    async def run_group(self, run: GroupRun, policy, lost: str = "") -> None:
        version = policy([run.work])
        if self.failing:
            raise GroupFailed("told to", 2)
        takes = len(run.work.prompts)
        drawn = Media(frames=np.zeros((takes, 1, 16, 16, 3), np.uint8), fps=8.0)
        media = asyncio.get_running_loop().create_future()
        media.set_result(drawn)
        meta = RolloutMeta(
            group=run.group,
            attempt=1,
            version=version.number,
            worker="w",
            seconds={},
            trajectory_bytes=0,
            media_bytes=0,
            measured=measure(drawn),
        )
        run.drawn(meta, media, media)
        run.scores = {"r": RewardScores(values=np.arange(takes, dtype=np.float32))}
        run.state = GroupState.SCORED


def evaluate(folder: Path, runner: Runner) -> tuple[dict | None, weakref.ref, Evaluator]:
    """The record, and whether the weights that were evaluated are still held; without help from the collector."""
    cfg = tiny.config(Path("unused"), evaluation={"prompts": 4, "batch": 2}, faults={"max_attempts": 2})
    weights = Weights()
    held = weakref.ref(weights)
    evaluator = Evaluator(RunContext(cfg=cfg, run_path=str(folder), cwd=os.getcwd()), runner, PROMPTS)

    async def body(version: PolicyVersion):
        try:
            return await evaluator.run(version)
        except RunFailed as error:
            assert str(error) == "the evaluation at step 3 failed after 2 attempts in told to"
            return None

    gc.collect()
    gc.disable()
    try:
        record = asyncio.run(body(PolicyVersion(number=3, tag="ema", checksum="", weights=weights)))
        del weights
        return record, held() is not None, evaluator
    finally:
        gc.enable()


@pytest.mark.parametrize("failing", [False, True])
def test_an_evaluation_lets_go_of_the_version_it_looked_at(tmp_path, failing):
    record, held, evaluator = evaluate(tmp_path, Runner(failing))
    assert not held and evaluator.progress == EvaluationProgress()
    if failing:
        assert record is None and evaluator.records == []
    else:
        assert (record["step"], record["tag"], record["n"], record["mean"]) == (3, "ema", 4, 0.5)
        assert len(list((tmp_path / "eval" / "step-000003").glob("*.png"))) == 4


def test_only_the_last_steps_stay_in_memory():
    recent, seen, shown = Recent(kept=3), 0, []
    for step in range(1, 8):
        recent.add({"step": step})
        if step in (1, 2, 6, 7):  # who looks often misses nothing; who comes late gets what is kept
            shown.append([record["step"] for record in recent.after(seen)])
            seen = recent.count
    assert shown == [[1], [2], [4, 5, 6], [7]] and recent.after(seen) == [] == recent.after(10**9)
    assert [record["step"] for record in recent.after(-2)] == [6, 7] and recent.count == 7
