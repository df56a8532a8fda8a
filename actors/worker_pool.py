"""A pool of equal actors, leased one at a time to whoever needs a worker.

    STARTING ──► IDLE ◄──lease──► BUSY ──resize──► DRAINING ──► (slot removed)
        ▲          │                │
        └── DEAD ◄─┴── replaced ────┘    after a failed call, no sign of life, or on a node that is being drained

`async with pool.lease(...) as worker` hands out a free worker, the most urgent request first. How the lease ends
decides the worker's fate: after success, or a failure that is the input's, the worker stays; after any other failure it
is replaced. What becomes of the work is the caller's decision.

Each slot has a task of its own that starts the actor and replaces it, so a slot that waits for a node, or for a model
to load, delays nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from actors.autoscale import History
from actors.ray_errors import describe, is_away, is_deterministic, is_lost, root
from actors.ray_options import MAX_START_S, RunContext, merged_env, ray_resources
from actors.request_queue import Priority, RequestQueue
from actors.worker_slot import WorkerSlot, WorkerState
from pipeline.config.resources import WorkerRange, describe_resources
from pipeline.core.errors import RunFailed
from pipeline.rewards.patience import Patience
from pipeline.runs.snapshot import PoolSummary

_MAX_PAUSE_S = 30.0  # between attempts at a worker that does not start while others work
log = logging.getLogger("rushes.pool")


class CallFailed(Exception):
    """A call of a leased worker failed. The text is one line that names worker, node and cause."""

    def __init__(self, worker: WorkerSlot, cause: Exception) -> None:
        super().__init__(f"{worker.place}: {describe(cause)}")
        self.worker_name, self.cause = worker.name, cause


@dataclass(eq=False)
class _LeaseRequest:
    avoid: str | None
    granted: asyncio.Future[WorkerSlot]


class WorkerPool:
    """Slots, leases, and the size of the pool. `start_args` are the arguments of each actor's `start` method; `backlog`
    counts as the work that waits for this pool (default: the lease requests). `limits` may be changed at any time.
    `patient`: what its actors call has answered before, so that a first start waits for it too."""

    def __init__(
        self,
        ctx: RunContext,
        cls: type,
        name: str,
        limits: WorkerRange,
        *,
        resources: Mapping[str, float],
        threads: int,
        start_args: tuple[Any, ...],
        capacity: int,
        runtime_env: Mapping[str, Any] | None = None,
        backlog: RequestQueue[Any] | None = None,
        patient: bool = False,
    ) -> None:
        self.ctx, self.cls, self.name, self.resources, self.limits = ctx, cls, name, resources, limits
        self.options = {
            **ray_resources(resources),
            "max_restarts": 0,  # a restarted actor would lack its model; the slot starts a whole one
            "max_task_retries": 0,
            "runtime_env": merged_env(runtime_env or {}, threads),
        }
        self.start_args = start_args
        self.slots: list[WorkerSlot] = []
        self.requests: RequestQueue[_LeaseRequest] = RequestQueue(name, capacity)
        self.backlog: RequestQueue[Any] = self.requests if backlog is None else backlog
        self.history = History()
        self.replaced = 0
        self._resize_reason = ""
        self._idle: dict[WorkerSlot, None] = {}  # in the order in which they became free
        self._generations: dict[str, int] = {}  # of removed slots: an actor's name is used once
        self._one_ready = asyncio.Event()
        self._patience = Patience(f"what {name} calls", ctx.cfg.faults.call_timeout_s, "faults.call_timeout_s")
        self._patient = patient
        self._tasks: asyncio.TaskGroup | None = None

    # ------------------------------------------------------------------------------------------- leases

    @contextlib.asynccontextmanager
    async def lease(self, priority: Priority = (), avoid: str | None = None) -> AsyncIterator[WorkerSlot]:
        """A worker for one piece of work. `avoid`: the name of one that is not taken while another accepts work.

        On exit the worker is free again, or is replaced: after a `CallFailed` whose cause is neither the input's fault
        nor a lost object. A cancelled holder's call is first waited for.
        """
        slot = await self._acquire(priority, avoid)
        try:
            yield slot
        except asyncio.CancelledError:
            if slot.call is None:
                self._end_lease(slot, None)
            else:
                slot.attention.set()  # the slot's task waits for the call
            raise
        except CallFailed as failure:
            self._end_lease(slot, failure.cause)
            raise
        except BaseException:
            self._end_lease(slot, None)
            raise
        self._end_lease(slot, None)

    async def result(self, worker: WorkerSlot, call: ray.ObjectRef, done: str) -> Any:
        """The answer to a leased worker's call. Raises `CallFailed`, also when it takes too long (not `done`)."""
        limit = self.ctx.cfg.faults.call_timeout_s
        started, worker.call = time.monotonic(), call
        try:
            try:
                async with asyncio.timeout(limit):  # unlike wait_for, without a task of its own
                    answer = await call
            except TimeoutError:
                raise TimeoutError(f"not {done} within {limit:g} s (faults.call_timeout_s)") from None
        except Exception as error:
            raise CallFailed(worker, error) from error
        worker.call = None
        self.history.finished(time.monotonic() - started)
        return answer

    async def _acquire(self, priority: Priority, avoid: str | None) -> WorkerSlot:
        for slot in self._idle:
            if self.may_use(slot, avoid):
                del self._idle[slot]
                slot.state = WorkerState.BUSY
                return slot
        request = _LeaseRequest(avoid, asyncio.get_running_loop().create_future())
        self.requests.add(request, priority)
        try:
            return await request.granted
        except asyncio.CancelledError:
            if request.granted.done() and not request.granted.cancelled():
                self._end_lease(request.granted.result(), None)
            raise
        finally:
            self.requests.withdraw(request)

    def may_use(self, slot: WorkerSlot, avoid: str | None) -> bool:
        return slot.name != avoid or not any(other.accepting for other in self.slots if other is not slot)

    def _end_lease(self, slot: WorkerSlot, error: Exception | None) -> None:
        """Decides the worker's fate."""
        slot.call = None
        if error is not None and not (is_deterministic(error) or is_lost(error)):
            slot.replace_reason = describe(error)
        if slot.state is WorkerState.DRAINING or slot.replace_reason:
            self._give_up(slot)
        else:
            self.offer(slot)

    def offer(self, slot: WorkerSlot) -> None:
        """Hands a free worker to the most urgent request that may use it."""
        slot.set_idle()
        request = self.requests.take(lambda request: not request.granted.done() and self.may_use(slot, request.avoid))
        if request is None:
            self._idle[slot] = None
        else:
            slot.state = WorkerState.BUSY
            request.granted.set_result(slot)

    def _offer_again(self) -> None:
        """A request that avoided an idle worker may have no other one left."""
        if self.requests:
            for slot in list(self._idle):
                del self._idle[slot]
                self.offer(slot)

    # ------------------------------------------------------------------------------------------- size

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Starts `limits.min` workers. `tasks` gets a task for every slot, which fails with the `RushesError` of an
        actor that can never start, or with `RunFailed`."""
        self._tasks = tasks
        self.resize(self.limits.min, "")

    async def one_ready(self) -> None:
        """Returns once a first worker has been ready."""
        await self._one_ready.wait()

    @property
    def staying(self) -> list[WorkerSlot]:
        """All slots but those that are being removed."""
        return [slot for slot in self.slots if slot.state is not WorkerState.DRAINING]

    def resize(self, size: int, reason: str) -> None:
        """Adds slots, or removes some: those without an actor first, then the idle, then the newest."""
        staying = self.staying
        if size != len(staying) and reason:
            log.info("%s: from %d to %d workers: %s", self.name, len(staying), size, reason)
            self._resize_reason = f"{len(staying)} to {size}: {reason}"
        self.history.resized()
        taken = {slot.name for slot in self.slots}
        free_names = (name for i in range(len(taken) + size + 1) if (name := f"{self.name}-{i}") not in taken)
        for _ in range(size - len(staying)):
            name = next(free_names)
            slot = WorkerSlot(name, generation=self._generations.get(name, 0))
            self.slots.append(slot)
            assert self._tasks is not None  # set by `start`
            slot.task = self._tasks.create_task(self._keep(slot))
        removable = sorted(staying, key=lambda slot: (slot.alive, slot.busy, -staying.index(slot)))
        for slot in removable[: max(0, len(staying) - size)]:
            self._remove(slot)
        self._offer_again()

    def _remove(self, slot: WorkerSlot) -> None:
        """Lets a busy worker finish; an idle one, or one that waits for a node or still loads, goes at once."""
        if slot.state is WorkerState.BUSY:
            slot.state = WorkerState.DRAINING
            return
        self._idle.pop(slot, None)
        assert slot.task is not None  # since it was added
        slot.task.cancel()
        self._leave(slot)

    def _leave(self, slot: WorkerSlot) -> None:
        self.slots.remove(slot)
        self._generations[slot.name] = slot.generation
        slot.kill()
        log.info("%s has left", slot.place)

    def replace(self, slot: WorkerSlot, reason: str) -> None:
        """Gives the slot a new actor once its worker is free."""
        if slot.state is WorkerState.IDLE:
            del self._idle[slot]
            slot.replace_reason = reason
            self._give_up(slot)
        elif slot.state is WorkerState.BUSY and not slot.replace_reason:
            slot.replace_reason = reason
            self._offer_again()

    def _give_up(self, slot: WorkerSlot) -> None:
        if slot.state is not WorkerState.DRAINING:
            slot.state = WorkerState.DEAD
        slot.attention.set()
        self._offer_again()

    # ------------------------------------------------------------------------------------------- a slot's life

    async def _keep(self, slot: WorkerSlot) -> None:
        """Starts the slot's actor and offers it; starts another one whenever it is given up, until the slot drains."""
        try:
            await self._start_actor(slot)
            while True:
                await slot.attention.wait()
                slot.attention.clear()
                if slot.call is not None and slot.busy:
                    self._end_lease(slot, await self._end_of_abandoned_call(slot.call))
                if slot.state is WorkerState.DRAINING:
                    break
                if slot.state is WorkerState.DEAD:
                    log.warning("replacing %s: %s", slot.place, slot.replace_reason)
                    slot.kill()
                    self.replaced += 1
                    await self._start_actor(slot)
        finally:
            if slot in self.slots:
                self._leave(slot)
        self._offer_again()

    async def _end_of_abandoned_call(self, call: ray.ObjectRef) -> Exception | None:
        """Waits for the call of a holder that was cancelled; what it failed with, if it did."""
        try:
            async with asyncio.timeout(self.ctx.cfg.faults.call_timeout_s):
                await call
        except Exception as error:
            return error
        return None

    async def _start_actor(self, slot: WorkerSlot) -> None:
        """Starts the slot's actor, again when its process dies. Raises the actor's own `RushesError`, since trying
        again would not help, or `RunFailed` when the attempts are used up and no other worker is alive."""
        attempts, attempt = self.ctx.cfg.faults.max_restarts + 1, 0
        while True:
            attempt += 1
            self._new_actor(slot)
            try:
                slot.host = (await slot.actor.info.remote())["host"]  # no limit: an autoscaled node takes its time
                slot.activity = "loading"
                async with asyncio.timeout(MAX_START_S):  # wait_for may swallow a cancellation
                    slot.info = await slot.actor.start.remote(*self.start_args)
            except Exception as error:
                if is_away(error) and (pause_s := self._pause_for(error)) is not None:
                    slot.kill()
                    slot.activity = "waiting for a service that is away"
                    attempt -= 1
                    await asyncio.sleep(pause_s)
                    continue
                if is_deterministic(error):
                    raise root(error) from error
                log.warning("%s did not start (attempt %d of %d): %s", slot.name, attempt, attempts, describe(error))
                slot.kill()
                if attempt < attempts:
                    continue
                if not any(other.alive for other in self.slots):
                    raise RunFailed(
                        f"{slot.place} did not start in {attempt} attempts: {describe(error)} (see {self.ctx.run.log})"
                    ) from error
                slot.activity = "waiting before the next attempt"  # the others carry on
                await asyncio.sleep(min(_MAX_PAUSE_S, 2.0 ** (attempt - attempts)))
            else:
                log.info("%s is process %d on %s", slot.name, slot.info["pid"], slot.host)
                self._one_ready.set()
                self._patience.answered()
                self.offer(slot)
                return

    def _pause_for(self, error: Exception) -> float | None:
        """Seconds until the actor is started again. None: a service that has never answered is more likely misspelt
        than away, or the patience is over."""
        return self._patience.pause_s(error) if self._patient or self._one_ready.is_set() else None

    def _new_actor(self, slot: WorkerSlot) -> None:
        slot.generation += 1
        slot.state, slot.replace_reason = WorkerState.STARTING, ""
        slot.activity = f"waiting for a node with {describe_resources(self.resources)}"
        suffix = f"#{slot.generation}" if slot.generation > 1 else ""
        options = {"name": f"{self.ctx.run.name}/{slot.name}{suffix}", **self.options}
        slot.handle = ray.remote(self.cls).options(**options).remote(self.ctx, slot.name)

    @property
    def alive(self) -> list[WorkerSlot]:
        return [slot for slot in self.slots if slot.alive]

    def summary(self) -> PoolSummary:
        staying = self.staying
        return PoolSummary(
            ready=sum(slot.alive for slot in staying),
            busy=sum(slot.busy for slot in self.slots),
            target=len(staying),
            leaving=len(self.slots) - len(staying),
            min=self.limits.min,
            max=self.limits.max,
            reason=self._resize_reason,
        )
