"""The batch builder without workers: which groups are drawn, when, and after pauses, failures and a resume."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
import tiny
from noise_grids import GRIDS

from actors.batch_builder import BatchBuilder
from actors.group_run import GroupFailed, GroupRun, GroupState
from actors.ray_errors import first_error
from pipeline.core.errors import RunFailed
from pipeline.core.types import PolicyVersion, PromptItem, RewardScores

PROMPTS = [PromptItem(index=i, text=f"prompt {i}") for i in range(5)]


class Runner:
    """Rolls out and scores at once, unless told that a group fails for good or has equal rewards."""

    grid = None

    def __init__(self, failing=(), flat=(), room=3) -> None:
        self.failing, self.flat, self._free = set(failing), set(flat), asyncio.Semaphore(room)
        self.submitted: list[int] = []
        self.calls: list[list[int]] = []
        self.lost: list[str] = []
        self.noisy: set[tuple[int, ...]] = set()  # the stochastic steps of the groups

    async def room(self) -> None:
        await self._free.acquire()
        self._free.release()

    async def rollout_together(self, runs, policy) -> None:
        self.calls.append([run.group for run in runs])
        for run in runs:
            await self._draw(run, policy)

    async def _draw(self, run, policy) -> None:
        self.submitted.append(run.group)
        self.noisy.add(run.work.sampling.stochastic_steps)
        async with self._free:
            await asyncio.sleep(random.Random(run.group).random() * 2e-3)
        policy([run.work])
        run.state = GroupState.SCORING

    async def run_group(self, run, policy, lost="") -> None:
        if lost:
            self.lost.append(lost)
            run.start_over()
        if run.state is GroupState.WAITING:
            self.calls.append([run.group])
            await self._draw(run, policy)
        if run.group in self.failing:
            raise GroupFailed("told to", 1)
        values = np.array([1, 1, 1, 1] if run.group in self.flat else [1, 2, 3, 4], np.float32)
        run.scores = {"r": RewardScores(values=values)}
        run.trajectory = run.media = None
        run.state = GroupState.SCORED


def make(runner: Runner, batch: int = 0, signal: dict | None = None, **step) -> BatchBuilder:
    cfg = tiny.config(
        tiny.Path("unused"),
        run={"steps": 6},
        rollout={"batch": batch},
        signal=signal or {},
        step={"takes": 4, "groups": 3, **step},
        faults={"max_attempts": 1},
    )
    return BatchBuilder(cfg, runner, PROMPTS)


def version(number: int) -> PolicyVersion:
    return PolicyVersion(number=number, tag="train", checksum="", weights=None)


async def whole_step(builder: BatchBuilder, step: int) -> list[GroupRun]:
    async for chunk in builder.chunks(step):
        if chunk.last:
            return chunk.so_far
    raise AssertionError("no last chunk")


async def steps(builder: BatchBuilder, count: int) -> list[list[int]]:
    batches = []
    begun = builder.ledger.step
    await builder.published(version(begun))
    for step in range(begun, begun + count):
        await builder.pause(False)
        runs = await asyncio.wait_for(whole_step(builder, step), 5)
        batches.append([run.group for run in runs])
        builder.signal(runs)
        builder.consumed(runs, step)
        await builder.pause(step % 2 == 0)  # as for an evaluation
        await asyncio.sleep(3e-3)
        await builder.published(version(step + 1))
    return batches


async def beside(builder: BatchBuilder, body):
    """What `body` returns, while `builder` runs."""
    running = asyncio.ensure_future(builder.run())
    try:
        return await body
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_every_group_is_submitted_once_and_failed_and_filtered_ones_are_replaced(staleness):
    async def body():
        runner = Runner(failing=[1], flat=[2, 5])
        builder = make(runner, max_staleness=staleness, signal={"zero_std": "filter"})
        return runner, await beside(builder, steps(builder, 6))

    runner, batches = asyncio.run(body())
    trained = [group for batch in batches for group in batch]
    assert sorted(runner.submitted) == list(range(21)) and len(trained) == 18
    assert sorted(trained) == [group for group in range(21) if group not in (1, 2, 5)]
    assert all(batch == sorted(batch) for batch in batches)


def test_groups_are_planned_on_the_noise_levels_that_the_workers_report():
    async def body():
        runner = Runner()
        builder = make(runner)
        runner.grid = GRIDS["sd3 in 4 steps"]  # as the first worker becomes ready
        await beside(builder, steps(builder, 2))
        return runner.noisy

    assert asyncio.run(body()) == {(0, 1)}


def test_a_step_whose_groups_all_have_equal_rewards_is_given_up():
    async def body():
        builder = make(Runner(flat=range(999)), groups=1, signal={"zero_std": "filter"})
        await builder.published(version(0))
        await builder.pause(False)
        try:
            await asyncio.wait_for(builder.run(), 10)
        except BaseExceptionGroup as failures:
            raise first_error(failures) from None

    with pytest.raises(RunFailed, match="step 0: 20 groups had equal rewards in all takes"):
        asyncio.run(body())


@pytest.mark.parametrize("room", [1, 9])
def test_neighbours_in_a_step_are_drawn_together_and_replacements_alone(room):
    """Whoever is faster, and however much room there is; of a resumed run too."""

    async def body():
        runner = Runner(flat=[3, 4], room=room)
        builder = make(runner, batch=11, groups=3, signal={"zero_std": "filter"})

        async def three_steps():
            await steps(builder, 3)
            return builder.state()

        state = await beside(builder, three_steps())
        second = Runner(room=room)
        resumed = make(second, batch=11, groups=3, signal={"zero_std": "filter"})
        resumed.load_state(state)
        await beside(resumed, steps(resumed, 1))
        return runner.calls, second.calls

    calls, later = asyncio.run(body())
    assert calls[:6] == [[0, 1], [2], [3, 4], [5], [6], [7]] and calls[6:8] == [[8, 9], [10]]
    assert later[:2] == [[11, 12], [13]]


def test_a_resumed_run_submits_again_what_was_admitted():
    async def body():
        builder = make(Runner(), max_staleness=1)

        async def two_steps():
            await steps(builder, 2)
            return builder.state()

        state = await beside(builder, two_steps())
        second = Runner()
        resumed = make(second, max_staleness=1)
        resumed.load_state(state)
        return await beside(resumed, steps(resumed, 4)), second.submitted

    batches, submitted = asyncio.run(body())
    assert batches == [[6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17]] and sorted(submitted) == list(range(6, 18))


def test_a_worker_never_asks_for_a_version_that_the_ledger_does_not_know_yet():
    """Nor afterwards for an older one: between the two a group would be drawn that may not be."""

    async def body():
        builder = make(Runner(), max_staleness=1)
        await builder.published(version(0))
        for number in (1, 2):
            builder.ledger.step = number  # as if the learner had taken a step
            async with builder._changed:  # others read the ledger
                publishing = asyncio.ensure_future(builder.published(version(number)))
                await asyncio.sleep(0)
                assert builder.policy([]).number == builder.ledger.version == number - 1
            await publishing
            assert builder.policy([]).number == builder.ledger.version == number

    asyncio.run(body())


def test_a_chunk_whose_trajectory_is_lost_comes_again_and_a_failed_group_begins_the_step_anew():
    """The last group of the first chunk is lost and drawn again; then group 0 is lost, and fails for good: another one
    takes its place, at the end of the step."""

    async def body():
        runner = Runner()
        builder = make(runner, max_staleness=0)

        async def one_step():
            await builder.published(version(0))
            await builder.pause(False)
            seen = []
            async for chunk in builder.chunks(0):
                seen.append((chunk.start, [run.group for run in chunk.runs]))
                if len(seen) == 1:
                    chunk.lost = [chunk.runs[-1].group]
                elif len(seen) == 2:
                    runner.failing.add(0)
                    chunk.lost = [0]
                if chunk.last and not chunk.lost:
                    return seen, [run.group for run in chunk.so_far]

        return await asyncio.wait_for(beside(builder, one_step()), 5), runner

    (seen, batch), runner = asyncio.run(body())
    assert batch == [1, 2, 3] and len(runner.lost) == 2 and "group 0: its trajectory was lost" in runner.lost[1]
    assert seen[0][0] == seen[1][0] == 0 and seen[0][1][0] == 0, "the lost chunk came again"
    assert [group for start, groups in seen[2:] for group in groups] == [1, 2, 3]
