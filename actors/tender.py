"""Looks after the pools while the run goes on: their sizes, workers that died at rest, machines that are taken away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from ray import exceptions as rx
from ray._private.state import state as cluster

from actors.autoscale import decide
from actors.queues import BoundedQueue
from actors.ray_errors import describe
from actors.role_actor import IDLE
from actors.worker_pool import WorkerPool, WorkerSlot
from pipeline.config.resources import WorkerRange
from pipeline.core.errors import ConfigError
from pipeline.core.files import did_you_mean

TICK_S = 1.0
_ASK_EVERY_S = 3.0  # a worker that has been idle that long is asked for a sign of life
_ANSWER_S = 60.0  # one that gives none in this time is stuck
log = logging.getLogger("rushes.pool")


class Tender:
    """`pairs`: the queue of each pool, and the pool, by the pool's name."""

    def __init__(self, pairs: Mapping[str, tuple[BoundedQueue, WorkerPool]]) -> None:
        self._pairs = pairs
        self._own = {name: pool.limits for name, (_, pool) in pairs.items()}  # of the config
        self._asked: dict[WorkerSlot, asyncio.Task] = {}
        self._idle: WeakKeyDictionary[WorkerSlot, int] = WeakKeyDictionary()  # ticks in a row at which it was seen idle

    # ------------------------------------------------------------------------------------------- sizes

    async def scale(self, targets: Mapping[str, int]) -> dict[str, str]:
        """Sets pools to a size; 0 gives one back to its own limits. Raises `ConfigError`, and changes nothing then."""
        for name, size in targets.items():
            if name not in self._pairs:
                raise ConfigError(
                    f"scale: there is no pool {name!r} (pools: {', '.join(self._pairs)})"
                    f"{did_you_mean(name, self._pairs)}"
                )
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ConfigError(
                    f"scale: {name}={size!r}: expected a whole number of workers, or 0 for the limits of the config"
                )
        said = {}
        for name, size in targets.items():
            pool, own = self._pairs[name][1], self._own[name]
            before = len(pool.staying)
            pool.limits = WorkerRange(size, size) if size else own
            after = min(max(before, pool.limits.min), pool.limits.max)
            if after != before:
                await pool.resize(after, "asked for by hand" if size else f"back to the config's limits, {own}")
            holds = f"; the policy decides again, within {own}" if not size else ""
            said[name] = (f"{before} -> {after} workers" if after != before else f"{before} workers, as before") + holds
        return said

    def step(self, seconds: float) -> None:
        """An optimisation step took this long."""
        for _, pool in self._pairs.values():
            pool.history.step(seconds)

    async def run(self) -> None:
        """For ever, once a second."""
        while True:
            await asyncio.sleep(TICK_S)
            going = await asyncio.to_thread(_draining_nodes)
            for queue, pool in self._pairs.values():
                await self._tend(queue, pool, going)

    async def _tend(self, queue: BoundedQueue, pool: WorkerPool, going: set[str]) -> None:
        staying = pool.staying
        load = pool.history.load(
            time.monotonic(),
            size=len(staying),
            starting=sum(not slot.ready for slot in staying),
            busy=sum(slot.busy for slot in pool.slots),
            depth=len(queue),
            waited_s=queue.age(),
        )
        decision = decide(load, pool.limits)
        if decision.size != load.size:
            await pool.resize(decision.size, decision.reason)
        moved = False
        for slot in pool.slots:
            if slot.ready and not slot.moving and slot.info["node"] in going:
                slot.moving, moved = "its node is being drained", True
            if not (slot.ready and slot.doing == IDLE and not slot.resting):
                self._idle.pop(slot, None)
            elif slot not in self._asked:
                self._idle[slot] = self._idle.get(slot, 0) + 1
                if self._idle[slot] * TICK_S >= _ASK_EVERY_S:
                    self._asked[slot] = asyncio.ensure_future(self._alive(queue, slot))
        if moved:
            await queue.poke()

    # ------------------------------------------------------------------------------------------- signs of life

    async def _alive(self, queue: BoundedQueue, slot: WorkerSlot) -> None:
        """A worker that is lost while it has nothing to do is found before a group is given to it."""
        generation = slot.generation
        try:
            try:
                info: dict[str, Any] = await asyncio.wait_for(slot.actor.info.remote(), _ANSWER_S)
            except TimeoutError:
                trouble = f"gave no sign of life for {_ANSWER_S:.0f} s"
            except rx.RayActorError as error:
                trouble = describe(error)
            else:
                slot.info |= info if slot.ready and slot.generation == generation else {}
                trouble = ""
            if trouble and slot.generation == generation and slot.ready and slot.doing == IDLE:
                slot.moving = trouble
                await queue.poke()
        finally:
            del self._asked[slot]
            self._idle.pop(slot, None)

    def close(self) -> None:
        for task in self._asked.values():
            task.cancel()


def _draining_nodes() -> set[str]:
    """Ids of nodes that Ray is told to give up: idle ones of an autoscaler, pre-empted ones that had notice."""
    try:
        return set(cluster.get_draining_nodes())
    except (rx.RayError, RuntimeError, ConnectionError) as error:
        log.debug("draining nodes are not known: %s", error)
        return set()
