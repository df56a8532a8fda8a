"""The training side of the flow without workers: what is submitted, when, and after pauses, failures and a resume."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from actors.batch_builder import BatchBuilder
from pipeline.core.errors import RunFailed
from pipeline.core.types import PolicyVersion, PromptItem, RewardScores

PROMPTS = [PromptItem(index=i, text=f"prompt {i}") for i in range(5)]


class Dispatcher:
    """Rolls out and scores at once, unless told that a group fails for good or has equal rewards."""

    def __init__(self, failing=(), flat=(), room=3) -> None:
        self.failing, self.flat, self.room = set(failing), set(flat), asyncio.Semaphore(room)
        self.submitted: list[int] = []
        self.calls: list[list[int]] = []
        self.training: BatchBuilder
        self._tasks: set[asyncio.Task] = set()
        self.error: asyncio.Future | None = None  # the first one of a task, where a test asks for it

    def background(self, coroutine) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if self.error and not self.error.done() and not task.cancelled() and task.exception():
            self.error.set_exception(task.exception())

    async def submit(self, *jobs) -> None:
        self.calls.append([job.group for job in jobs])
        for job in jobs:
            await self.room.acquire()
            self.submitted.append(job.group)
            self.background(self._work(job))

    async def _work(self, job) -> None:
        await asyncio.sleep(random.Random(job.group).random() * 2e-3)
        self.room.release()
        attempt = self.training.started(job, "w", self.training.version())
        job.work = SimpleNamespace(**{f: getattr(job.work, f) for f in ("group", "step")}, attempt=attempt)
        if job.group in self.failing:
            self.training.rollout_failed(job, "told to")
            return
        self.training.rolled(job)
        self.training.scoring(job)
        values = np.array([1, 1, 1, 1] if job.group in self.flat else [1, 2, 3, 4], np.float32)
        job.scores = {"r": RewardScores(values=values)}
        job.trajectory = job.media = None
        await self.training.scored(job)


def make(flow: Dispatcher, batch: int = 0, **algorithm) -> BatchBuilder:
    cfg = tiny.config(
        tiny.Path("unused"),
        run={"steps": 6},
        rollout={"batch": batch},
        algorithm={"group_size": 4, "groups_per_step": 3, **algorithm},
        faults={"max_attempts": 1},
    )
    training = flow.training = BatchBuilder(cfg, flow, PROMPTS)
    return training


def version(number: int) -> PolicyVersion:
    return PolicyVersion(number=number, tag="train", checksum="", weights=None)


async def steps(training: BatchBuilder, count: int) -> list[list[int]]:
    batches = []
    begun = training.ledger.step
    await training.published(version(begun))
    for step in range(begun, begun + count):
        await training.pause(False)
        jobs = await asyncio.wait_for(training.first(step, training.ledger.groups_per_step), 5)
        batches.append([job.group for job in jobs])
        training.advantages(jobs)
        training.consumed(jobs, step)
        await training.pause(step % 2 == 0)  # as for an evaluation
        await asyncio.sleep(3e-3)
        await training.published(version(step + 1))
    return batches


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_every_group_is_submitted_once_and_failed_and_filtered_ones_are_replaced(staleness):
    async def body():
        flow = Dispatcher(failing=[1], flat=[2, 5])
        training = make(flow, max_staleness=staleness, advantage={"zero_std": "filter"})
        pump = asyncio.ensure_future(training.pump())
        batches = await steps(training, 6)
        pump.cancel()
        return flow, batches

    flow, batches = asyncio.run(body())
    trained = [group for batch in batches for group in batch]
    assert sorted(flow.submitted) == list(range(21)) and len(trained) == 18
    assert sorted(trained) == [group for group in range(21) if group not in (1, 2, 5)]


def test_a_step_whose_groups_all_have_equal_rewards_is_given_up():
    async def body():
        flow = Dispatcher(flat=range(999))
        flow.error = asyncio.get_running_loop().create_future()
        training = make(flow, groups_per_step=1, advantage={"zero_std": "filter"})
        await training.published(version(0))
        await training.pause(False)
        pump = asyncio.ensure_future(training.pump())
        try:
            await asyncio.wait_for(flow.error, 10)
        finally:
            pump.cancel()

    with pytest.raises(RunFailed, match="step 0: 20 groups had equal rewards in all takes"):
        asyncio.run(body())


@pytest.mark.parametrize("room", [1, 9])
def test_neighbours_in_a_step_are_drawn_together_and_replacements_alone(room):
    """Whoever is faster, and however much room there is; of a resumed run too."""

    async def body():
        flow = Dispatcher(flat=[3, 4], room=room)
        training = make(flow, batch=11, groups_per_step=3, advantage={"zero_std": "filter"})
        pump = asyncio.ensure_future(training.pump())
        await steps(training, 3)
        state = training.state()
        pump.cancel()
        second = Dispatcher(room=room)
        resumed = make(second, batch=11, groups_per_step=3, advantage={"zero_std": "filter"})
        resumed.load_state(state)
        pump = asyncio.ensure_future(resumed.pump())
        await steps(resumed, 1)
        pump.cancel()
        return flow.calls, second.calls

    calls, later = asyncio.run(body())
    assert calls[:6] == [[0, 1], [2], [3, 4], [5], [6], [7]] and calls[6:8] == [[8, 9], [10]]
    assert later[:2] == [[11, 12], [13]]


def test_a_resumed_run_submits_again_what_was_admitted():
    async def body():
        first = Dispatcher()
        training = make(first, max_staleness=1)
        pump = asyncio.ensure_future(training.pump())
        await steps(training, 2)
        state = training.state()
        pump.cancel()
        second = Dispatcher()
        resumed = make(second, max_staleness=1)
        resumed.load_state(state)
        pump = asyncio.ensure_future(resumed.pump())
        batches = await steps(resumed, 4)
        pump.cancel()
        return batches, second.submitted

    batches, submitted = asyncio.run(body())
    assert batches == [[6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17]] and sorted(submitted) == list(range(6, 18))


def test_a_worker_never_asks_for_a_version_that_the_ledger_does_not_know_yet():
    """Nor afterwards for an older one: between the two a group would be drawn that may not be."""

    async def body():
        training = make(Dispatcher(), max_staleness=1)
        await training.published(version(0))
        for number in (1, 2):
            training.ledger.step = number  # as if the learner had taken a step
            async with training._changed:  # others are looking at the books
                publishing = asyncio.ensure_future(training.published(version(number)))
                await asyncio.sleep(0)
                assert training.version().number == training.ledger.version == number - 1
            await publishing
            assert training.version().number == training.ledger.version == number

    asyncio.run(body())
