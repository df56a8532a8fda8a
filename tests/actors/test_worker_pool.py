"""Pools that grow, shrink, and replace the dead: with made-up actors, and what needs processes on a real Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from ray import cloudpickle

from actors import autoscale, tender
from actors.queues import BoundedQueue
from actors.ray_errors import describe, is_preempted
from actors.ray_options import RunContext
from actors.role_actor import IDLE, RoleActor
from actors.tender import Tender
from actors.worker_pool import WorkerPool, WorkerSlot
from jobs.cluster.ray_session import RaySession
from pipeline.config.resources import WorkerRange
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError

pytestmark = pytest.mark.ray


def config(**ray) -> Config:
    sections = {"generator": {"pretrained": "x"}, "prompts": {"train": "x"}, "rewards": {"r": {"scorer": "x"}}}
    return Config.model_validate({**sections, "ray": {"address": "local", **ray}})


class Answer:
    """Of an actor that is alive."""

    @staticmethod
    async def remote() -> dict:
        return {}


class MadeUp:
    info = Answer


class MadeUpPool(WorkerPool):
    """Its actors come up at once as long as there is room for them, each on a node of its slot's name."""

    room = 3

    async def spawn(self, slot: WorkerSlot) -> None:
        slot.generation += 1
        slot.moving, slot.info, slot.doing = "", {}, self._waiting
        while len(self.ready) >= self.room:
            await asyncio.sleep(0.005)
        slot.handle, slot.info, slot.doing = MadeUp(), {"node": slot.name}, IDLE
        self._one_ready.set()
        await self._changed()

    def kill(self, slot: WorkerSlot) -> None:
        slot.handle, slot.info = None, {}


class Worker(RoleActor):
    role = "rollout"
    hands_back = True

    def start(self) -> dict:
        self.phase = IDLE
        return self.info()

    def work(self, seconds: float) -> int:
        with self.doing("working"):
            time.sleep(seconds)
        return os.getpid()


class World:
    """A pool whose slots take numbers (seconds of work) from a queue and note who did them."""

    def __init__(self, folder: Path, limits: WorkerRange, kind: type[WorkerPool] = MadeUpPool) -> None:
        ctx = RunContext(cfg=config(), run_path=str(folder), cwd=os.getcwd())
        self.queue: BoundedQueue[float] = BoundedQueue("rollout", 50)
        self.pool = kind(ctx, Worker, "rollout", limits, resources={"CPU": 1.0}, threads=1, start_args=())
        self.tender = Tender({"rollout": (self.queue, self.pool)})
        self.done: list[tuple[str, int]] = []
        self.handed_back: list[str] = []
        self.tasks: list[asyncio.Task] = []

    def background(self, coroutine) -> asyncio.Task:
        self.tasks.append(asyncio.ensure_future(coroutine))
        return self.tasks[-1]

    async def work(self, slot: WorkerSlot) -> None:
        while (item := await self.queue.get_until(lambda: slot.resting)) is not None:
            slot.doing = "working"
            try:
                if isinstance(slot.actor, MadeUp):
                    await asyncio.sleep(item)
                    self.done.append((slot.name, 0))
                else:
                    self.done.append((slot.name, await slot.actor.work.remote(item)))
                self.pool.history.finished(item)
            except Exception as error:
                assert is_preempted(error), error
                self.handed_back.append(describe(error))
                slot.moving = "SIGTERM"
                await self.queue.put_back(item)
            slot.doing = IDLE

    async def until(self, condition, seconds: float = 60) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, {slot.name: slot.doing for slot in self.pool.slots}
            for task in self.tasks:
                if task.done() and not task.cancelled() and task.exception():
                    raise task.exception()
            await asyncio.sleep(0.02)

    def run(self, body) -> None:
        async def all_of_it():
            try:
                start = asyncio.ensure_future(self.pool.start(self.work, self.queue.poke, self.background))
                await self.until(start.done)
                self.background(self.tender.run())
                await body(self)
            finally:
                self.tender.close()
                for task in self.tasks:
                    task.cancel()
                await asyncio.gather(*self.tasks, return_exceptions=True)
                self.pool.stop()

        asyncio.run(all_of_it())


@pytest.fixture
def fast(monkeypatch):
    """Seconds become hundredths; the set is of the nodes that are drained."""
    drained: set[str] = set()
    monkeypatch.setattr(tender, "TICK_S", 0.01)
    monkeypatch.setattr(tender, "_draining_nodes", lambda: drained)
    monkeypatch.setattr(autoscale, "PATIENCE_S", 0.05)
    monkeypatch.setattr(autoscale, "WINDOW_S", 0.6)
    return drained


def test_scaled_by_hand_past_the_room_there_is_and_down_again(fast, tmp_path):
    async def body(world: World) -> None:
        pool = world.pool
        assert await world.tender.scale({"rollout": 4}) == {"rollout": "1 -> 4 workers"}
        await world.until(lambda: len(pool.ready) == 3)
        for _ in range(30):
            await world.queue.put(0.02)
        await world.until(lambda: len(world.done) == 30)
        assert {name for name, _ in world.done} == {"rollout-0", "rollout-1", "rollout-2"}
        assert [s.doing for s in pool.slots if not s.ready] == ["waiting for a node with 1 CPU"]  # and nobody for it
        for _ in range(5):
            await world.queue.put(0.3)
        await world.until(lambda: sum(slot.busy for slot in pool.slots) == 3)
        await world.tender.scale({"rollout": 1})
        assert len(pool.staying) == 1
        await asyncio.sleep(0.01)
        assert len(pool.slots) == 3  # the one that waited has gone at once
        await world.until(lambda: len(pool.slots) == 1)
        assert len(world.done) >= 33  # those that left finished what they had in hand, and took nothing more
        await world.until(lambda: len(world.done) == 35)
        assert "policy" in (await world.tender.scale({"rollout": 0}))["rollout"] and pool.limits == WorkerRange(1, 1)
        with pytest.raises(ConfigError, match=r"no pool 'rolout' \(pools: rollout\); did you mean rollout"):
            await world.tender.scale({"rollout": 3, "rolout": 2})
        with pytest.raises(ConfigError, match="rollout=-1: expected a whole number"):
            await world.tender.scale({"rollout": -1})
        assert len(pool.staying) == 1

    World(tmp_path, WorkerRange(1, 1)).run(body)


def test_a_pool_follows_its_queue_and_says_why(fast, tmp_path, caplog):
    async def body(world: World) -> None:
        caplog.set_level("INFO", "rushes.pool")
        for _ in range(40):
            await world.queue.put(0.1)
        await world.until(lambda: len(world.pool.ready) == 3)
        await world.until(lambda: len(world.done) == 40 and len(world.pool.slots) == 1)
        assert "from 1 to 2 workers: 3" in caplog.text and "groups waiting, the oldest for" in caplog.text
        assert "had work at once in the last" in world.pool.state()["reason"]

    World(tmp_path, WorkerRange(1, 6)).run(body)


def test_workers_leave_a_node_that_is_drained_once_they_have_finished(fast, tmp_path):
    async def body(world: World) -> None:
        await world.until(lambda: len(world.pool.ready) == 2)
        await world.queue.put(0.2)
        await world.queue.put(0.2)
        await world.until(lambda: all(slot.busy for slot in world.pool.slots))
        fast.add("rollout-1")
        await world.until(lambda: world.pool.slots[1].moving)
        fast.clear()
        await world.until(lambda: world.pool.slots[1].generation == 2)
        assert len(world.done) == 2 and world.pool.slots[0].generation == 1

    World(tmp_path, WorkerRange(2, 2)).run(body)


@pytest.fixture(scope="module")
def cluster():
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors' processes cannot import a test
    with RaySession(config(init={"num_cpus": 1, "object_store_memory": 80 * 2**20})) as own:
        yield own


def test_dead_or_asked_to_go_workers_are_replaced_without_losing_work(cluster, tmp_path):
    async def body(world: World) -> None:
        slot = world.pool.ready[0]
        first = slot.info["pid"]
        os.kill(first, signal.SIGTERM)  # at rest: it ends at once, and that is noticed although it has nothing to do
        await world.until(lambda: slot.ready and slot.info["pid"] != first)
        second = slot.info["pid"]
        await world.queue.put(1.0)
        await world.queue.put(0.0)
        await world.until(lambda: slot.busy)
        await asyncio.sleep(0.3)
        os.kill(second, signal.SIGTERM)  # at work: it finishes that, and hands back what comes next
        await world.until(lambda: len(world.done) == 2)
        assert world.done[0][1] == second and world.done[1][1] not in (first, second)
        assert len(world.handed_back) == 1 and "SIGTERM" in world.handed_back[0]

    World(tmp_path, WorkerRange(1, 1), WorkerPool).run(body)
