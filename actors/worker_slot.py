"""A place for an actor, and what state its actor is in: of a worker pool, or of the learner group."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle


class WorkerState(enum.Enum):
    STARTING = "starting"  # no usable actor yet: waits for a node, or loads
    IDLE = "idle"
    BUSY = "busy"  # leased
    DRAINING = "draining"  # leased for the last time; the slot is removed afterwards
    DEAD = "dead"  # its actor has gone or is given up


ALIVE = (WorkerState.IDLE, WorkerState.BUSY, WorkerState.DRAINING)


@dataclass(eq=False)
class WorkerSlot:
    """A place for an actor. The actor may be replaced; the place and its name stay."""

    name: str  # rollout-0, reward.clip-1, learner
    generation: int = 0  # actors this place has had
    handle: ActorHandle | None = None
    state: WorkerState = WorkerState.STARTING
    activity: str = "starting"  # for display only
    info: dict[str, Any] = field(default_factory=dict)  # what the actor last said about itself
    host: str = "a node not reached yet"  # where the actor is, or was last
    policy_version: tuple[int, str, str] | None = None  # key of the version that a rollout worker holds
    replace_reason: str = ""  # why the actor is to be replaced as soon as its lease ends
    call: ray.ObjectRef | None = None  # in progress
    attention: asyncio.Event = field(default_factory=asyncio.Event)  # wakes the slot's task
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
    def alive(self) -> bool:
        return self.state in ALIVE

    @property
    def busy(self) -> bool:
        return self.state in (WorkerState.BUSY, WorkerState.DRAINING)

    @property
    def accepting(self) -> bool:
        """Whether it takes work, now or once its lease has ended."""
        return self.state in (WorkerState.IDLE, WorkerState.BUSY) and not self.replace_reason

    def set_idle(self) -> None:
        self.state, self.activity = WorkerState.IDLE, "idle"

    def kill(self) -> None:
        """Ends the actor's process; the slot is DEAD until it gets another one."""
        if self.handle is not None:
            end_process(self.handle)
        self.handle, self.policy_version, self.call = None, None, None
        self.state, self.activity = WorkerState.DEAD, "starting"


def end_process(handle: ActorHandle) -> None:
    ray.kill(handle, no_restart=True)
