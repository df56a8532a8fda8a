"""Keeps the pools right while a run trains: autoscales them, health-checks idle workers, evacuates draining nodes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

from ray import exceptions as rx

# Ray has no public way to ask for draining nodes; its own Train library reads them from here too.
from ray._private.state import state as cluster

from actors.autoscale import decide
from actors.ray_errors import describe
from actors.worker_pool import WorkerPool
from actors.worker_slot import WorkerSlot, WorkerState
from pipeline.config.resources import WorkerRange
from pipeline.core.errors import ConfigError
from pipeline.core.files import did_you_mean

TICK_S = 1.0
_PROBE_EVERY_S = 3.0  # a worker that has been idle this long is probed
_PROBE_TIMEOUT_S = 60.0  # one that does not answer in this time is stuck
log = logging.getLogger("rushes.pool")


class PoolSupervisor:
    """One per run, for all of its pools."""

    def __init__(self, pools: Sequence[WorkerPool]) -> None:
        self._pools = {pool.name: pool for pool in pools}
        self._configured = {pool.name: pool.limits for pool in pools}
        self._probes: dict[WorkerSlot, asyncio.Task] = {}
        self._idle_ticks: WeakKeyDictionary[WorkerSlot, int] = WeakKeyDictionary()  # in a row

    async def run(self) -> None:
        """Ticks once a second until it is cancelled."""
        async with asyncio.TaskGroup() as probes:
            while True:
                await asyncio.sleep(TICK_S)
                draining = await asyncio.to_thread(_draining_nodes)
                for pool in self._pools.values():
                    self._autoscale(pool)
                    for slot in pool.slots:
                        if slot.alive and slot.info["node"] in draining:
                            pool.replace(slot, "its node is being drained")
                        self._probe_if_idle(pool, slot, probes)

    # ------------------------------------------------------------------------------------------- sizes

    def scale(self, targets: Mapping[str, int]) -> dict[str, str]:
        """Sets pools to a size; 0 gives one back to its configured limits. Returns a sentence for each. Raises
        `ConfigError`, and then changes nothing."""
        for name, size in targets.items():
            if name not in self._pools:
                raise ConfigError(
                    f"scale: there is no pool {name!r} (pools: {', '.join(self._pools)})"
                    f"{did_you_mean(name, self._pools)}"
                )
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ConfigError(
                    f"scale: {name}={size!r}: expected a whole number of workers, or 0 for the limits of the config"
                )
        return {name: self._scale_pool(self._pools[name], size) for name, size in targets.items()}

    def _scale_pool(self, pool: WorkerPool, size: int) -> str:
        configured = self._configured[pool.name]
        before = len(pool.staying)
        pool.limits = WorkerRange(size, size) if size else configured
        after = min(max(before, pool.limits.min), pool.limits.max)
        if after != before:
            pool.resize(after, "set by hand" if size else f"back to the config's limits, {configured}")
        change = f"{before} -> {after} workers" if after != before else f"{before} workers, as before"
        return change if size else f"{change}; the policy decides again, within {configured}"

    def _autoscale(self, pool: WorkerPool) -> None:
        staying = pool.staying
        load = pool.history.load(
            time.monotonic(),
            size=len(staying),
            starting=sum(not slot.alive for slot in staying),
            busy=sum(slot.busy for slot in pool.slots),
            depth=len(pool.backlog),
            waited_s=pool.backlog.age(),
        )
        decision = decide(load, pool.limits)
        if decision.size != load.size:
            pool.resize(decision.size, decision.reason)

    # ------------------------------------------------------------------------------------------- health

    def _probe_if_idle(self, pool: WorkerPool, slot: WorkerSlot, probes: asyncio.TaskGroup) -> None:
        if slot.state is not WorkerState.IDLE:
            self._idle_ticks.pop(slot, None)
        elif slot not in self._probes:
            self._idle_ticks[slot] = self._idle_ticks.get(slot, 0) + 1
            if self._idle_ticks[slot] * TICK_S >= _PROBE_EVERY_S:
                self._probes[slot] = probes.create_task(self._probe(pool, slot))

    async def _probe(self, pool: WorkerPool, slot: WorkerSlot) -> None:
        """Finds a dead worker that has nothing to do before a group is given to it."""
        generation, trouble = slot.generation, ""
        try:
            try:
                async with asyncio.timeout(_PROBE_TIMEOUT_S):
                    info = await slot.actor.info.remote()
            except TimeoutError:
                trouble = f"did not answer within {_PROBE_TIMEOUT_S:.0f} s"
            except rx.RayActorError as error:
                trouble = describe(error)
            if slot.generation == generation and slot.state is WorkerState.IDLE:
                if trouble:
                    pool.replace(slot, trouble)
                else:
                    slot.info |= info
        finally:
            del self._probes[slot]
            self._idle_ticks.pop(slot, None)


def _draining_nodes() -> set[str]:
    """Ids of nodes that Ray is about to take away: idle ones of an autoscaler, pre-empted ones that had notice."""
    try:
        return set(cluster.get_draining_nodes())
    except (rx.RayError, RuntimeError, ConnectionError) as error:
        log.debug("draining nodes are not known: %s", error)
        return set()
