"""The dispatcher with made-up actors: retries on the same seeds, counted and uncounted failures, isolation of a bad
group, lost takes, back-pressure, and cancellation."""

from __future__ import annotations

import asyncio

import pytest
from dispatcher_world import PROMPT, World, fail_times, no_time, scores_of
from ray import exceptions as rx

from actors.group_run import GroupFailed, GroupRun, GroupState
from actors.ray_errors import WorkerPreempted
from actors.worker_slot import WorkerState
from pipeline.core.errors import RewardError
from pipeline.core.types import PolicyVersion
from pipeline.rl.group_plan import train_work


@pytest.fixture
def world(tmp_path, monkeypatch):
    return lambda **options: World(tmp_path, monkeypatch, **options)


def test_a_group_comes_back_with_the_scores_of_every_reward_in_config_order(world):
    w = world(rewards=("b", "a"), rollout_workers=1)

    async def body():
        runs = [w.group(0), w.group(1)]
        for run in runs:
            await w.run_group(run)
        return runs

    runs = w.run(body)
    assert [run.state for run in runs] == [GroupState.SCORED] * 2
    assert [list(run.scores) for run in runs] == [["b", "a"]] * 2 and runs[1].scores["a"].values.tolist() == [1] * 4
    assert runs[0].trajectory == "trajectory 0" and runs[0].meta.worker == "rollout-0" and runs[0].requests == {}
    assert w.weights == ["weights", None]  # a worker is given a version once
    assert w.dispatcher.rollouts.slots == [] and w.dispatcher.drain_load_s() == 0.0


def test_a_worker_whose_call_did_not_end_well_is_given_the_weights_again(world):
    """It may have loaded them, or not: what it holds is not known."""
    w = world(rollout_workers=1, faults={"max_attempts": 1})
    other = PolicyVersion(number=0, tag="ema", checksum="e", weights="ema")

    async def body():
        await w.run_group(w.group(0))
        w.on_rollout = fail_times(1, RewardError("bad"))
        with pytest.raises(GroupFailed):
            await w.dispatcher.run_group(w.group(1), lambda works: other)
        await w.run_group(w.group(2))
        abandoned = asyncio.ensure_future(w.dispatcher.run_group(w.group(3), lambda works: other))
        await asyncio.sleep(0)
        abandoned.cancel()
        await w.run_group(w.group(4))
        return [slot.generation for slot in w.dispatcher.rollouts.slots]

    assert w.run(body) == [1] and w.weights == ["weights", "ema", "weights", "ema", "weights"]


def test_a_failed_rollout_is_repeated_on_the_same_seeds_by_another_worker(world):
    w = world()
    w.on_rollout = fail_times(1, MemoryError("ill"))

    async def body():
        run = w.group(0)
        await w.run_group(run)
        await w.all_alive()
        return run, [slot.generation for slot in w.dispatcher.rollouts.slots]

    run, generations = w.run(body)
    (first, (before,)), (second, (after,)) = w.rollouts
    assert before.seeds == after.seeds and (before.attempt, after.attempt) == (1, 2) and first != second
    assert sorted(generations) == [1, 2] and run.retries == 1 and run.failed_rollouts == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_group_fails_after_its_attempts_with_worker_node_and_cause(world, workers):
    w = world(rollout_workers=workers)
    w.on_rollout = fail_times(99, RewardError("the input's fault"))

    async def body():
        with pytest.raises(GroupFailed) as failure:
            await w.run_group(w.group(0))
        return failure.value, [slot.generation for slot in w.dispatcher.rollouts.slots]

    failure, generations = w.run(body)
    assert failure.attempts == 2 and failure.reason == f"rollout-{workers - 1} on here: the input's fault"
    assert generations == [1] * workers  # nothing is wrong with the workers
    assert [name for name, _ in w.rollouts] == ["rollout-0", f"rollout-{workers - 1}"]


def test_what_a_pre_empted_worker_hands_back_does_not_count(world):
    w = world(faults={"max_attempts": 1})
    w.on_rollout = fail_times(3, WorkerPreempted("asked to end"))
    preempted = fail_times(2, WorkerPreempted("asked to end"))

    def score(server, groups):
        preempted()
        return scores_of(groups)

    w.on_score = score

    async def body():
        run = w.group(0)
        await w.run_group(run)
        return run

    run = w.run(body)
    assert len(w.rollouts) == 4 and len(w.scorings) == 3 and run.retries == run.failed_rollouts == 0
    assert [works[0].attempt for _, works in w.rollouts] == [1] * 4


@pytest.mark.parametrize("error", [MemoryError("ill"), WorkerPreempted("asked to end"), RewardError("one of them")])
def test_groups_whose_shared_rollout_fails_are_drawn_one_by_one_at_no_cost(world, error):
    w = world(faults={"max_attempts": 1})
    w.on_rollout = lambda worker, works: len(works) > 1 and fail_times(1, error)()

    async def body():
        runs = [w.group(number) for number in range(3)]
        outcomes = await w.together(runs)
        return outcomes, runs

    outcomes, runs = w.run(body)
    assert outcomes == [None] * 3 and w.drawn[0] == [0, 1, 2] and sorted(w.drawn[1:]) == [[0], [1], [2]]
    assert all(run.retries == 0 and run.work.attempt == 1 for run in runs)


def test_a_shared_scoring_that_fails_isolates_the_bad_group_at_no_cost(world):
    """The call as a whole kills its server, then one of the groups is refused when it is scored alone."""
    w = world(faults={"max_attempts": 1})

    def score(server, groups):
        if len(groups) > 1:
            raise rx.RayActorError()
        return [RewardError("no green circles")] if groups == [1] else scores_of(groups)

    w.on_score = score

    async def body():
        outcomes = await w.together([w.group(number) for number in range(3)])
        return outcomes, w.dispatcher.pools[1].slots[0].generation

    (first, second, third), generation = w.run(body)
    assert first is third is None and isinstance(second, GroupFailed) and "no green circles" in second.reason
    assert w.scorings[0][1] == [0, 1, 2] and sorted(groups for _, groups in w.scorings[1:]) == [[0], [1], [2]]
    assert generation == 2 and w.drawn == [[0, 1, 2]]


def test_a_bad_group_fails_alone_when_its_shared_scoring_succeeds(world):
    w = world(faults={"max_attempts": 2})
    w.on_score = lambda server, groups: [RewardError("nan") if g == 1 else scores_of([g])[0] for g in groups]

    async def body():
        return await w.together([w.group(number) for number in range(3)])

    first, second, third = w.run(body)
    assert first is third is None and isinstance(second, GroupFailed) and second.attempts == 2
    assert w.drawn == [[0, 1, 2]] and sum(1 in groups for _, groups in w.scorings) == 2


def test_scoring_is_repeated_without_a_new_rollout_by_another_server(world):
    w = world(servers=2)
    ill = fail_times(1, MemoryError("ill"))

    def score(server, groups):
        ill()
        return scores_of(groups)

    w.on_score = score

    async def body():
        run = w.group(0)
        await w.run_group(run)
        return run

    run = w.run(body)
    assert len(w.rollouts) == 1 and len({name for name, _ in w.scorings}) == 2
    assert (run.retries, run.failed_scorings, run.failed_rollouts) == (1, 1, 0)


def test_failures_of_all_rewards_count_together_until_new_takes_are_drawn(world):
    w = world(rewards=("a", "b"), faults={"max_attempts": 2})
    w.on_score = lambda server, groups: [RewardError("nan")] * len(groups)

    async def body():
        run = w.group(0)
        with pytest.raises(GroupFailed, match="nan"):
            await w.run_group(run)
        assert w.dispatcher.pools[1].backlog.waiting() == w.dispatcher.pools[2].backlog.waiting() == []
        return run

    run = w.run(body)
    assert run.failed_scorings == 2 and len(w.rollouts) == 1 and len(w.scorings) <= 3


def test_lost_takes_are_drawn_again_as_another_attempt(world):
    w = world(faults={"max_attempts": 3})
    lost = fail_times(1, rx.ObjectLostError("00", None, ""))

    def score(server, groups):
        lost()
        return scores_of(groups)

    w.on_score = score

    async def body():
        run = w.group(0)
        await w.run_group(run)
        assert (run.failed_rollouts, run.state) == (1, GroupState.SCORED)
        await w.run_group(run, lost="its trajectory was lost")
        assert (run.failed_rollouts, run.state) == (2, GroupState.SCORED)
        with pytest.raises(GroupFailed, match="was lost again"):
            await w.run_group(run, lost="its trajectory was lost again")
        return w.dispatcher.pools[1].slots[0].generation

    assert w.run(body) == 1  # the server is not to blame
    assert len(w.rollouts) == 3 and len({works[0].seeds for _, works in w.rollouts}) == 1


def test_a_worker_is_held_until_the_rewards_have_room_for_its_media(world):
    w = world(rollout_workers=2)
    go = asyncio.Event()
    w.scoring_takes = go.wait

    async def body():
        batcher = w.dispatcher._batchers["a"]
        batcher.requests.capacity = 1
        batcher._reward = batcher._reward.model_copy(update={"batch_items": 0})
        groups = [asyncio.ensure_future(w.run_group(w.group(number))) for number in range(9)]
        await asyncio.sleep(0.05)
        # one is being scored, one waits, and two hold their workers
        assert len(w.drawn) == 4 and all(slot.activity == "handing over" for slot in w.dispatcher.rollouts.slots)
        assert len(w.dispatcher.rollouts.requests) == 5
        go.set()
        await asyncio.gather(*groups)

    w.run(body)
    assert sorted(w.drawn) == [[number] for number in range(9)]


def test_groups_go_to_workers_in_the_order_in_which_they_are_needed(world):
    w = world(rollout_workers=1)

    async def body():
        runs = [GroupRun(train_work(w.cfg, number, step, PROMPT)) for number, step in ((0, 1), (1, 1), (2, 0))]
        await asyncio.gather(*(w.run_group(run) for run in runs))

    w.run(body)
    assert w.drawn == [[0], [2], [1]]  # the first one found a free worker


def test_a_cancelled_group_leaves_nothing_behind(world):
    w = world(rollout_workers=1)
    go = asyncio.Event()
    w.rollout_takes = w.scoring_takes = go.wait

    async def body():
        runs = [w.group(number) for number in range(3)]
        groups = [asyncio.ensure_future(w.run_group(run)) for run in runs]
        await asyncio.sleep(0.01)
        for group in groups:
            group.cancel()
        await asyncio.sleep(0.01)
        assert all(group.cancelled() for group in groups) and len(w.dispatcher.rollouts.requests) == 0
        assert w.dispatcher.rollouts.slots[0].busy  # it has not finished its call
        go.set()
        await w.run_group(runs[2])
        go.clear()
        waiting = asyncio.ensure_future(w.run_group(w.group(4)))
        w.rollout_takes = no_time
        go.set()
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.sleep(0.01)
        assert w.dispatcher.pools[1].backlog.waiting() == []
        assert all(slot.state is WorkerState.IDLE for pool in w.dispatcher.pools for slot in pool.slots)

    w.run(body)
    assert w.drawn == [[0], [2], [4]]  # the cancelled one in the queue was never begun
