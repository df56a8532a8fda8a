"""Leases, and pools that grow, shrink, and replace the dead: with made-up actors, and what needs processes on a real
Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from ray import cloudpickle

from actors import autoscale, pool_supervisor, worker_slot
from actors.pool_supervisor import PoolSupervisor
from actors.ray_errors import WorkerPreempted, is_preempted
from actors.ray_options import RunContext
from actors.role_actor import IDLE, RoleActor
from actors.worker_pool import CallFailed, WorkerPool
from actors.worker_slot import WorkerSlot, WorkerState
from pipeline.config.resources import WorkerRange
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, InputError

pytestmark = pytest.mark.ray


def config(**ray) -> Config:
    sections = {"generator": {"pretrained": "x"}, "prompts": {"train": "x"}, "rewards": {"r": {"scorer": "x"}}}
    return Config.model_validate({**sections, "faults": {"call_timeout_s": 30}, "ray": {"address": "local", **ray}})


class Reference:
    """To a made-up actor's answer: as with Ray's, it may be awaited again, and a cancelled await leaves the call be."""

    def __init__(self, answer: Awaitable) -> None:
        self._call = asyncio.ensure_future(answer)

    def __await__(self):
        return asyncio.shield(self._call).__await__()


class Method:
    """Of a made-up actor."""

    def __init__(self, answer: Callable[..., Awaitable]) -> None:
        self._answer = answer

    def remote(self, *args) -> Reference:
        return Reference(self._answer(*args))


class MadeUp:
    """An actor without a process. It comes up once there is room for it, on a node of its slot's name."""

    def __init__(self, pool: MadeUpPool, slot: WorkerSlot) -> None:
        self.pool, self.slot = pool, slot
        self.info, self.start, self.work = Method(self._info), Method(self._start), Method(self._work)

    async def _info(self) -> dict:
        while self not in self.pool.up and len(self.pool.up) >= self.pool.room:
            await asyncio.sleep(0.005)
        self.pool.up.add(self)
        return {"host": "here"}

    async def _start(self) -> dict:
        return {"node": self.slot.name, "pid": 0}

    async def _work(self, seconds: float, error: Exception | None = None) -> int:
        await asyncio.sleep(seconds)
        if error:
            raise error
        return 0


class MadeUpPool(WorkerPool):
    """Its actors come up at once as long as there is room for them."""

    room = 3

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.up: set[MadeUp] = set()

    def _new_actor(self, slot: WorkerSlot) -> None:
        slot.generation += 1
        slot.state, slot.replace_reason = WorkerState.STARTING, ""
        slot.activity = "waiting for a node with 1 CPU"
        slot.handle = MadeUp(self, slot)


class Worker(RoleActor):
    role = "rollout"
    drains_on_sigterm = True

    def start(self) -> dict:
        self.phase = IDLE
        return self.info()

    def work(self, seconds: float) -> int:
        with self.doing("working"):
            time.sleep(seconds)
        return os.getpid()


class World:
    """A pool whose workers do seconds of work and note who did them."""

    def __init__(self, folder: Path, limits: WorkerRange, kind: type[WorkerPool] = MadeUpPool) -> None:
        ctx = RunContext(cfg=config(), run_path=str(folder), cwd=os.getcwd())
        self.pool = kind(ctx, Worker, "rollout", limits, resources={"CPU": 1.0}, threads=1, start_args=(), capacity=99)
        self.supervisor = PoolSupervisor([self.pool])
        self.done: list[tuple[str, int]] = []
        self.handed_back: list[str] = []
        self.failed: list[Exception] = []
        self.tasks: asyncio.TaskGroup

    def submit(self, seconds: float, error: Exception | None = None, **lease) -> asyncio.Task:
        return self.tasks.create_task(self.work(seconds, error, **lease))

    async def work(self, seconds: float, error: Exception | None = None, **lease) -> None:
        while True:
            try:
                async with self.pool.lease(**lease) as slot:
                    slot.activity = "working"
                    more = () if error is None else (error,)
                    pid = await self.pool.result(slot, slot.actor.work.remote(seconds, *more), "done")
                    self.done.append((slot.name, pid))
                    return
            except CallFailed as failure:
                if not is_preempted(failure.cause):
                    self.failed.append(failure)
                    return
                self.handed_back.append(str(failure))
                error = None

    async def until(self, condition, seconds: float = 60) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, {slot.name: slot.activity for slot in self.pool.slots}
            await asyncio.sleep(0.02)

    def run(self, body) -> None:
        async def all_of_it():
            async with asyncio.TaskGroup() as self.tasks:
                self.pool.start(self.tasks)
                await self.pool.one_ready()
                supervising = self.tasks.create_task(self.supervisor.run())
                await body(self)
                supervising.cancel()
                for slot in self.pool.slots:
                    slot.task.cancel()

        asyncio.run(all_of_it())


@pytest.fixture
def fast(monkeypatch):
    """Seconds become hundredths; the set is of the nodes that are drained."""
    drained: set[str] = set()
    monkeypatch.setattr(pool_supervisor, "TICK_S", 0.01)
    monkeypatch.setattr(pool_supervisor, "_draining_nodes", lambda: drained)
    monkeypatch.setattr(autoscale, "PATIENCE_S", 0.05)
    monkeypatch.setattr(autoscale, "WINDOW_S", 0.6)
    return drained


@pytest.fixture
def made_up(fast, monkeypatch):
    """For pools of `MadeUpPool`."""
    monkeypatch.setattr(worker_slot, "end_process", lambda handle: handle.pool.up.discard(handle))
    return fast


# ---------------------------------------------------------------------------------------------- leases


def test_a_free_worker_goes_to_the_most_urgent_request_and_wakes_that_one_alone(made_up, tmp_path):
    async def body(world: World) -> None:
        first = world.submit(0.05)
        await asyncio.sleep(0)
        waiting = [world.submit(0.0, priority=(step,)) for step in range(50, 0, -1)]
        await first
        await waiting[-1]
        assert sum(task.done() for task in waiting) <= 2 and len(world.pool.requests) >= 47
        await waiting[0]
        assert all(task.done() for task in waiting) and world.pool.slots[0].state is WorkerState.IDLE

    World(tmp_path, WorkerRange(1, 1)).run(body)


def test_a_cancelled_request_takes_no_worker(made_up, tmp_path):
    async def body(world: World) -> None:
        first = world.submit(0.05)
        await asyncio.sleep(0.01)
        cancelled, granted, last = world.submit(0.0), world.submit(0.0), world.submit(0.0)
        await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.sleep(0)
        assert len(world.pool.requests) == 2
        await first
        granted.cancel()  # it has been handed the worker, but has not run yet
        await last
        assert granted.cancelled() and len(world.done) == 2

    World(tmp_path, WorkerRange(1, 1)).run(body)


def test_a_worker_is_avoided_as_long_as_another_one_takes_work(made_up, tmp_path):
    async def body(world: World) -> None:
        await world.until(lambda: len(world.pool.alive) == 2)
        busy = world.submit(0.1, avoid="rollout-0")
        await asyncio.sleep(0.01)
        picky = world.submit(0.0, avoid="rollout-0")  # rollout-0 is idle, and yet it waits for rollout-1
        await world.submit(0.0)
        await asyncio.sleep(0.01)
        assert not picky.done()
        await picky
        await busy
        assert [name for name, _ in world.done] == ["rollout-0", "rollout-1", "rollout-1"]
        stuck = world.submit(0.3, avoid="rollout-0")
        picky = world.submit(0.0, avoid="rollout-0")
        await asyncio.sleep(0.01)
        world.pool.replace(world.pool.slots[1], "its node is being drained")
        await picky  # rollout-1 takes nothing any more
        assert world.done[-1][0] == "rollout-0" and not stuck.done()
        await stuck

    World(tmp_path, WorkerRange(2, 2)).run(body)


def test_how_a_call_ends_decides_about_its_worker(made_up, tmp_path):
    """The input's fault keeps it; any other failure replaces it, and so does SIGTERM, whose work is done by another."""

    async def body(world: World) -> None:
        slot = world.pool.slots[0]
        await world.submit(0.0, InputError("the prompt's own fault"))
        assert slot.generation == 1 and slot.state is WorkerState.IDLE and len(world.failed) == 1
        await world.submit(0.0, MemoryError("ill"))
        assert str(world.failed[1]) == "rollout-0 on here: MemoryError: ill"
        await world.until(lambda: slot.generation == 2 and slot.alive)
        await world.submit(0.0, WorkerPreempted("asked to end"))
        assert (
            slot.generation == 3 and len(world.handed_back) == 1 and len(world.done) == 1 and world.pool.replaced == 2
        )

    World(tmp_path, WorkerRange(1, 1)).run(body)


def test_the_worker_of_a_cancelled_holder_finishes_before_it_is_lent_again(made_up, tmp_path):
    async def body(world: World) -> None:
        slot = world.pool.slots[0]
        cancelled = world.submit(0.1)
        await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.sleep(0.01)
        assert cancelled.cancelled() and slot.busy
        began = time.monotonic()
        await world.submit(0.0)
        assert time.monotonic() - began > 0.05 and slot.generation == 1
        cancelled = world.submit(0.05, MemoryError("ill"))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        await world.submit(0.0)
        assert slot.generation == 2

    World(tmp_path, WorkerRange(1, 1)).run(body)


# ---------------------------------------------------------------------------------------------- sizes


def test_scaled_by_hand_past_the_room_there_is_and_down_again(made_up, tmp_path):
    async def body(world: World) -> None:
        pool = world.pool
        assert world.supervisor.scale({"rollout": 4}) == {"rollout": "1 -> 4 workers"}
        await world.until(lambda: len(pool.alive) == 3)
        for _ in range(30):
            world.submit(0.02)
        await world.until(lambda: len(world.done) == 30)
        assert {name for name, _ in world.done} == {"rollout-0", "rollout-1", "rollout-2"}
        waiting = [slot.activity for slot in pool.slots if not slot.alive]
        assert waiting == ["waiting for a node with 1 CPU"]  # and nobody for it
        for _ in range(5):
            world.submit(0.3)
        await world.until(lambda: sum(slot.busy for slot in pool.slots) == 3)
        world.supervisor.scale({"rollout": 1})
        assert len(pool.staying) == 1
        await asyncio.sleep(0.01)
        assert len(pool.slots) == 3  # the one that waited has gone at once
        await world.until(lambda: len(pool.slots) == 1)
        assert len(world.done) >= 33  # those that left finished what they had, and took nothing more
        await world.until(lambda: len(world.done) == 35)
        assert "policy" in world.supervisor.scale({"rollout": 0})["rollout"] and pool.limits == WorkerRange(1, 1)
        with pytest.raises(ConfigError, match=r"no pool 'rolout' \(pools: rollout\); did you mean rollout"):
            world.supervisor.scale({"rollout": 3, "rolout": 2})
        with pytest.raises(ConfigError, match="rollout=-1: expected a whole number"):
            world.supervisor.scale({"rollout": -1})
        assert len(pool.staying) == 1

    World(tmp_path, WorkerRange(1, 1)).run(body)


def test_a_pool_follows_its_queue_and_says_why(made_up, tmp_path, caplog):
    async def body(world: World) -> None:
        caplog.set_level("INFO", "rushes.pool")
        for _ in range(40):
            world.submit(0.1)
        await world.until(lambda: len(world.pool.alive) == 3)
        await world.until(lambda: len(world.done) == 40 and len(world.pool.slots) == 1)
        assert "from 1 to 2 workers: 3" in caplog.text and "requests waiting, the oldest for" in caplog.text
        assert "had work at once in the last" in world.pool.summary().reason

    World(tmp_path, WorkerRange(1, 6)).run(body)


def test_workers_leave_a_node_that_is_drained_once_they_have_finished(made_up, tmp_path):
    async def body(world: World) -> None:
        await world.until(lambda: len(world.pool.alive) == 2)
        world.submit(0.2)
        world.submit(0.2)
        await world.until(lambda: all(slot.busy for slot in world.pool.slots))
        made_up.add("rollout-1")
        await world.until(lambda: world.pool.slots[1].replace_reason)
        made_up.clear()
        await world.until(lambda: world.pool.slots[1].generation == 2)
        assert len(world.done) == 2 and world.pool.slots[0].generation == 1

    World(tmp_path, WorkerRange(2, 2)).run(body)


# ---------------------------------------------------------------------------------------------- processes


def test_dead_or_pre_empted_workers_are_replaced_without_losing_work(cluster, fast, tmp_path):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors' processes cannot import a test

    async def body(world: World) -> None:
        slot = world.pool.alive[0]
        first = slot.info["pid"]
        os.kill(first, signal.SIGTERM)  # idle: it ends at once, and that is noticed although it has nothing to do
        await world.until(lambda: slot.alive and slot.info["pid"] != first)
        second = slot.info["pid"]
        world.submit(1.0)
        world.submit(0.0)
        await world.until(lambda: slot.busy)
        await asyncio.sleep(0.3)
        os.kill(second, signal.SIGTERM)  # busy: it finishes that, and hands back what comes next
        await world.until(lambda: len(world.done) == 2)
        assert world.done[0][1] == second and world.done[1][1] not in (first, second)
        assert len(world.handed_back) == 1 and "SIGTERM" in world.handed_back[0]

    World(tmp_path, WorkerRange(1, 1), WorkerPool).run(body)
