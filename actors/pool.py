"""A pool of equal actors: starts them, replaces the dead, and says who and where they are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.common import MAX_START_S, RoleActor, RunContext, actor_env, ray_resources
from actors.failures import describe, is_deterministic, root
from pipeline.errors import RunFailed
from pipeline.placement import in_words

STARTING = "starting"
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


@dataclass
class Slot:
    """A place in a pool. Its actor may be replaced; the place and its name stay."""

    name: str  # rollout-0, reward.clip-1, learner
    generation: int = 0  # actors this place has had
    handle: ActorHandle | None = None
    info: dict[str, Any] = field(default_factory=dict)  # of the living actor; empty while there is none
    host: str = "a node not reached yet"  # where the actor is, or was last
    confirmed: tuple[int, str, str] | None = None  # (number, tag, checksum) that a rollout worker holds
    doing: str = STARTING

    @property
    def actor(self) -> Any:
        if self.handle is None:
            raise RuntimeError(f"{self.name} has no actor at the moment")
        return self.handle

    @property
    def place(self) -> str:
        """`rollout-0 on host`, for messages."""
        return f"{self.name} on {self.host}"


class Pool:
    """`start_args` are the arguments of each actor's `start` method."""

    def __init__(
        self,
        ctx: RunContext,
        cls: type[RoleActor],
        names: list[str],
        *,
        resources: Mapping[str, float],
        threads: int,
        start_args: tuple[Any, ...],
    ) -> None:
        self.ctx, self.cls, self.resources = ctx, cls, resources
        self.slots = [Slot(name) for name in names]
        self.options = {
            **ray_resources(resources),
            "max_restarts": 0,  # a restarted actor would lack its model; `replace` starts a whole one
            "max_task_retries": 0,
            "runtime_env": {"env_vars": actor_env(threads)},
        }
        self.start_args = start_args
        self.replaced = 0

    async def start(self) -> None:
        """All actors, at the same time. Raises the actors' own `RushesError`, or `RunFailed`."""
        await together(*(self.spawn(slot) for slot in self.slots))

    async def spawn(self, slot: Slot) -> None:
        """Starts the slot's actor, trying again when its process dies. A `RushesError` from it is raised as it is:
        trying again would not help."""
        attempts = self.ctx.cfg.faults.max_attempts
        for attempt in range(1, attempts + 1):
            slot.generation += 1
            slot.confirmed, slot.info, slot.doing = None, {}, self._waiting
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
                if attempt == attempts:
                    raise RunFailed(
                        f"{slot.place} did not start in {attempts} tries: {describe(error)} (see {self.ctx.run.log})"
                    ) from error
            else:
                slot.doing = "idle"
                log.info("%s is process %d on %s", slot.name, slot.info["pid"], slot.host)
                return

    async def replace(self, slot: Slot, reason: str) -> None:
        log.warning("replacing %s: %s", slot.place, reason)
        self.kill(slot)
        self.replaced += 1
        await self.spawn(slot)

    def kill(self, slot: Slot) -> None:
        if slot.handle is not None:
            ray.kill(slot.handle, no_restart=True)
        slot.handle, slot.confirmed, slot.info, slot.doing = None, None, {}, STARTING

    def stop(self) -> None:
        for slot in self.slots:
            self.kill(slot)
            slot.doing = "stopped"

    def others_alive(self, slot: Slot) -> bool:
        return any(other is not slot and other.handle is not None and other.info for other in self.slots)

    @property
    def _waiting(self) -> str:
        return f"waiting for a node with {in_words(self.resources)}"
