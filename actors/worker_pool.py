"""A pool of equal actors: starts them, replaces the dead, grows, shrinks, and says who and where they are.

Every slot has a task of its own: start an actor, do the pool's work with it until the slot leaves, end the actor. So a
slot that waits for a node, or for a model to load, keeps nobody else waiting.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.autoscale import History
from actors.ray_errors import describe, is_deterministic, root
from actors.ray_options import MAX_START_S, RunContext, merged_env, ray_resources
from actors.role_actor import IDLE, RoleActor
from pipeline.config.resources import WorkerRange, describe_resources
from pipeline.core.errors import RunFailed

STARTING = "starting"
_MAX_PAUSE_S = 30.0  # between the tries of a worker that does not come up while others do
log = logging.getLogger("rushes.pool")


async def together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Runs all at the same time; the first exception cancels the others and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(eq=False)
class WorkerSlot:
    """A place in a pool. Its actor may be replaced; the place and its name stay."""

    name: str  # rollout-0, reward.clip-1, learner
    generation: int = 0  # actors this place has had
    handle: ActorHandle | None = None
    info: dict[str, Any] = field(default_factory=dict)  # of the living actor; empty while there is none
    host: str = "a node not reached yet"  # where the actor is, or was last
    confirmed: tuple[int, str, str] | None = None  # (number, tag, checksum) that a rollout worker holds
    doing: str = STARTING
    leaving: bool = False  # takes no more work; ends once it has handed over what it has
    moving: str = ""  # why its actor is to be replaced by a new one once it has handed over what it has
    task: asyncio.Task | None = None

    @property
    def actor(self) -> Any:
        if self.handle is None:
            raise RuntimeError(f"{self.name} has no actor at the moment")
        return self.handle

    @property
    def place(self) -> str:
        """`rollout-0 on host`, for messages."""
        return f"{self.name} on {self.host}"

    @property
    def ready(self) -> bool:
        return bool(self.info) and self.handle is not None

    @property
    def busy(self) -> bool:
        return self.ready and self.doing != IDLE

    @property
    def resting(self) -> bool:
        """Its task shall stop asking for work."""
        return self.leaving or bool(self.moving)


class WorkerPool:
    """`start_args` are the arguments of each actor's `start` method. `limits` may be changed at any time."""

    def __init__(
        self,
        ctx: RunContext,
        cls: type[RoleActor],
        name: str,
        limits: WorkerRange,
        *,
        resources: Mapping[str, float],
        threads: int,
        start_args: tuple[Any, ...],
        runtime_env: Mapping[str, Any] | None = None,
    ) -> None:
        self.ctx, self.cls, self.name, self.resources = ctx, cls, name, resources
        self.limits = limits
        self.slots: list[WorkerSlot] = []
        self.history = History()
        self.reason = ""  # of the last change of size
        self.options = {
            **ray_resources(resources),
            "max_restarts": 0,  # a restarted actor would lack its model; `replace` starts a whole one
            "max_task_retries": 0,
            "runtime_env": merged_env(runtime_env or {}, threads),
        }
        self.start_args = start_args
        self.replaced = 0
        self._generations: dict[str, int] = {}  # of names that have left; an actor's name is used once
        self._one_ready = asyncio.Event()

    # ------------------------------------------------------------------------------------------- size

    async def start(
        self,
        work: Callable[[WorkerSlot], Awaitable[None]],
        changed: Callable[[], Awaitable[None]],
        background: Callable[[Coroutine[Any, Any, None]], asyncio.Task],
    ) -> None:
        """Returns once the first actor is ready; the others join as they come up.

        `work` uses a slot that is ready, until it rests; `changed` is called when a slot has become ready or has gone;
        `background` runs a slot's task, whose exception (the actors' own `RushesError`, or `RunFailed`) ends the run.
        """
        self._work, self._changed, self._background = work, changed, background
        await self.resize(self.limits.min, "")
        await self._one_ready.wait()

    @property
    def staying(self) -> list[WorkerSlot]:
        """All slots but those that leave."""
        return [slot for slot in self.slots if not slot.leaving]

    @property
    def ready(self) -> list[WorkerSlot]:
        return [slot for slot in self.slots if slot.ready]

    async def resize(self, size: int, reason: str) -> None:
        """Adds slots, or lets some leave: those without an actor first, then the idle, then the newest."""
        staying = self.staying
        if size != len(staying) and reason:
            log.info("%s: from %d to %d workers: %s", self.name, len(staying), size, reason)
            self.reason = f"{len(staying)} to {size}: {reason}"
        self.history.resized()
        taken = {slot.name for slot in self.slots}
        free = (name for i in range(len(taken) + size + 1) if (name := f"{self.name}-{i}") not in taken)
        for _ in range(size - len(staying)):
            slot = WorkerSlot(name := next(free), generation=self._generations.get(name, 0))
            self.slots.append(slot)
            slot.task = self._background(self._live(slot))
        order = sorted(staying, key=lambda slot: (slot.ready, slot.busy, -staying.index(slot)))
        for slot in order[: max(0, len(staying) - size)]:
            slot.leaving = True
            if not slot.ready and slot.task is not None:
                slot.task.cancel()  # it waits for a node or still loads
        await self._changed()

    async def _live(self, slot: WorkerSlot) -> None:
        try:
            await self.spawn(slot)
            while not slot.leaving:
                await self._work(slot)
                if slot.moving and not slot.leaving:
                    await self.replace(slot, slot.moving)
        except asyncio.CancelledError:
            if not slot.leaving:
                raise
        finally:
            self.kill(slot)
            self.slots.remove(slot)
            self._generations[slot.name] = slot.generation
        log.info("%s has left", slot.place)
        await self._changed()

    # ------------------------------------------------------------------------------------------- actors

    async def spawn(self, slot: WorkerSlot) -> None:
        """Starts the slot's actor, trying again when its process dies. A `RushesError` from it is raised as it is:
        trying again would not help. `RunFailed` is raised when the tries are used up and no other actor is ready."""
        attempts, attempt = self.ctx.cfg.faults.max_restarts + 1, 0
        while True:
            attempt += 1
            slot.generation += 1
            slot.confirmed, slot.info, slot.doing, slot.moving = None, {}, self._waiting, ""
            suffix = f"#{slot.generation}" if slot.generation > 1 else ""
            name = f"{self.ctx.run.name}/{slot.name}{suffix}"
            actor: Any = ray.remote(self.cls).options(name=name, **self.options).remote(self.ctx, slot.name)
            slot.handle = actor
            try:
                slot.host = (await actor.info.remote())["host"]  # no limit: an autoscaled node takes its time
                slot.doing = STARTING
                slot.info = await asyncio.wait_for(actor.start.remote(*self.start_args), MAX_START_S)
            except Exception as error:
                if is_deterministic(error):
                    raise root(error) from error
                log.warning("%s did not start (try %d of %d): %s", slot.name, attempt, attempts, describe(error))
                self.kill(slot)
                if attempt < attempts:
                    continue
                if not self.ready:
                    raise RunFailed(
                        f"{slot.place} did not start in {attempt} tries: {describe(error)} (see {self.ctx.run.log})"
                    ) from error
                slot.doing = "waiting before the next try"  # the others carry on
                await asyncio.sleep(min(_MAX_PAUSE_S, 2.0 ** (attempt - attempts)))
            else:
                slot.doing = IDLE
                log.info("%s is process %d on %s", slot.name, slot.info["pid"], slot.host)
                self._one_ready.set()
                await self._changed()
                return

    async def replace(self, slot: WorkerSlot, reason: str) -> None:
        """A new actor in the slot, unless the slot is leaving."""
        log.warning("replacing %s: %s", slot.place, reason)
        self.kill(slot)
        await self._changed()
        if not slot.leaving:
            self.replaced += 1
            await self.spawn(slot)

    def kill(self, slot: WorkerSlot) -> None:
        if slot.handle is not None:
            ray.kill(slot.handle, no_restart=True)
        slot.handle, slot.confirmed, slot.info, slot.doing = None, None, {}, STARTING

    def stop(self) -> None:
        for slot in self.slots:
            self.kill(slot)
            slot.doing = "stopped"

    def others_alive(self, slot: WorkerSlot) -> bool:
        return any(other is not slot and other.ready and not other.resting for other in self.slots)

    def state(self) -> dict[str, Any]:
        """For people: sizes, limits, and why it last changed."""
        staying = self.staying
        return {
            "ready": sum(slot.ready for slot in staying),
            "busy": sum(slot.busy for slot in self.slots),
            "wanted": len(staying),
            "leaving": len(self.slots) - len(staying),
            "min": self.limits.min,
            "max": self.limits.max,
            "reason": self.reason,
        }

    @property
    def _waiting(self) -> str:
        return f"waiting for a node with {describe_resources(self.resources)}"
