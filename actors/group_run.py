"""The record of one group's progress, and the interface through which training and evaluation await groups."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import ray

from actors.request_queue import Priority
from pipeline.core.types import Feedback, GroupBatch, GroupWork, PolicyVersion, RewardScores, RolloutMeta
from pipeline.rl.noise_grid import NoiseGrid

PolicySource = Callable[[Sequence[GroupWork]], PolicyVersion]
"""Returns the version to draw these groups with; called when a worker is about to begin."""


class GroupState(enum.Enum):
    WAITING = "waiting"  # for a rollout
    ROLLOUT = "rollout"  # a worker draws it
    SCORING = "scoring"  # its takes are with the reward servers, or wait for them
    SCORED = "scored"


@dataclass(eq=False)
class GroupRun:
    """One group: its work, its results so far, and its failures. Retries use the same work, so the same seeds."""

    work: GroupWork
    state: GroupState = GroupState.WAITING
    failed_rollouts: int = 0
    failed_scorings: int = 0  # of the present takes
    retries: int = 0
    avoid: str | None = None  # the worker that its last rollout failed on
    meta: RolloutMeta = field(init=False)  # from SCORING on
    media: ray.ObjectRef | None = None  # from SCORING on, until nobody needs it
    trajectory: Any = None  # a reference, from SCORING on, until nobody needs it; None in an evaluation
    requests: dict[str, Any] = field(default_factory=dict)  # the `score_batcher.PendingScore` of each reward
    # By reward, in config order: all that servers score a group of this purpose with, when SCORED.
    scores: dict[str, RewardScores] = field(default_factory=dict)

    @property
    def group(self) -> int:
        return self.work.group

    @property
    def priority(self) -> Priority:
        """Evaluations first, since training waits for them; then in the order in which the learner needs the groups."""
        return (self.work.purpose == "train", self.work.step, self.group)

    def begin_rollout(self) -> None:
        self.state = GroupState.ROLLOUT
        if self.work.attempt != self.failed_rollouts + 1:
            self.work = replace(self.work, attempt=self.failed_rollouts + 1)

    def drawn(self, meta: RolloutMeta, media: ray.ObjectRef, trajectory: ray.ObjectRef) -> None:
        self.meta, self.media, self.trajectory = meta, media, trajectory
        self.state, self.failed_scorings, self.avoid = GroupState.SCORING, 0, None

    def staleness(self, learner_version: int) -> int:
        """Of its takes; those that are given do not age."""
        return learner_version - self.meta.version if self.work.drawn else 0

    def batch(self, feedback: Feedback, learner_version: int) -> GroupBatch:
        """What the learner trains on."""
        return GroupBatch(
            trajectory=self.trajectory,
            feedback=feedback,
            staleness=self.staleness(learner_version),
            prompts=self.work.prompts,
            micro_batches=self.meta.micro_batches,
        )

    def start_over(self) -> None:
        """Drops the takes; the group waits for a rollout again."""
        self.state, self.media, self.trajectory, self.scores = GroupState.WAITING, None, None, {}


class GroupFailed(Exception):
    """A group has used up its attempts. `reason`: its last failure, in one line."""

    def __init__(self, reason: str, attempts: int) -> None:
        super().__init__(reason)
        self.reason, self.attempts = reason, attempts


class GroupRunner(Protocol):
    """The part of the dispatcher that training and evaluation use."""

    grid: NoiseGrid | None  # noise levels of the rollouts' sampler steps, once a worker has probed its pipeline

    async def room(self) -> None:
        """Waits while the queue for rollout workers is full: back-pressure on admission."""

    async def rollout_together(self, runs: Sequence[GroupRun], policy: PolicySource) -> None:
        """Draws groups of one step in one pipeline call. If that fails, `run_group` draws them one by one."""

    async def run_group(self, run: GroupRun, policy: PolicySource, lost: str = "") -> None:
        """rollout -> every reward. `lost`: why takes drawn earlier are gone. Raises `GroupFailed`."""
