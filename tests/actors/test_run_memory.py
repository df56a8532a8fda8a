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

from actors.dispatcher import Job
from actors.evaluation import Evaluator
from actors.ray_options import RunContext
from actors.step_recorder import Recent
from pipeline.core.errors import RunFailed
from pipeline.core.types import Media, PolicyVersion, PromptItem, RewardScores, RolloutMeta

PROMPTS = [PromptItem(index=i, text=f"prompt {i}") for i in range(4)]


class Weights:
    """Stands for a reference to the weights in the object store."""


class Dispatcher:
    """Draws and scores at once, or fails what it is told to."""

    def __init__(self, failing: bool = False) -> None:
        self.failing, self.tasks = failing, []

    async def submit(self, job: Job) -> None:
        attempt = job.sink.started(job, "w", job.sink.version())
        if self.failing:
            while job.sink.rollout_failed(job, "told to"):
                job.sink.started(job, "w", job.sink.version())
        job.meta = RolloutMeta(
            group=job.group, attempt=attempt, version=3, worker="w", seconds={}, trajectory_bytes=0, media_bytes=0
        )
        takes = len(job.work.prompts)
        job.media = asyncio.get_running_loop().create_future()
        job.media.set_result(Media(frames=np.zeros((takes, 1, 16, 16, 3), np.uint8), fps=8.0))
        job.sink.rolled(job)
        job.sink.scoring(job)
        job.scores = {"r": RewardScores(values=np.arange(takes, dtype=np.float32))}
        await job.sink.scored(job)


def evaluate(folder: Path, flow: Dispatcher) -> tuple[dict | None, weakref.ref, Evaluator]:
    """The record, and whether the weights that were evaluated are still held; without help from the collector."""
    cfg = tiny.config(Path("unused"), evaluation={"prompts": 4, "batch": 2}, faults={"max_attempts": 2})
    weights = Weights()
    held = weakref.ref(weights)
    evaluator = Evaluator(RunContext(cfg=cfg, run_path=str(folder), cwd=os.getcwd()), flow, PROMPTS)

    async def body(version: PolicyVersion):
        try:
            return await evaluator.run(version)
        except RunFailed:
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
    record, held, evaluator = evaluate(tmp_path, Dispatcher(failing))
    assert not held and evaluator.progress == (0, 0)
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
