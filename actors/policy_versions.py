"""Policy versions on their way from the learner to the workers.

The controller asks the learner for the weights and so owns the reference: a version outlives any worker. Workers pull
it (one object, shared by all workers of a node) with the first work they get for it, recompute the checksum from what
they hold, and draw only then: `actors.rollout_worker`. A call of its own for that would cost the controller as much as
a group does.
"""

from __future__ import annotations

import time
from typing import Literal

import ray

from actors.learner_group import LearnerGroup
from actors.worker_pool import WorkerSlot
from pipeline.core.types import PolicyVersion


class Publisher:
    """Fetches versions from the learner, and knows which worker still needs one."""

    def __init__(self, learner: LearnerGroup) -> None:
        self._learner = learner
        self.sync_s = 0.0  # fetch, or the longest that a worker took to load and check, since `drain_sync`

    async def fetch(self, tag: Literal["train", "ema"]) -> PolicyVersion:
        """A new version from the learner's present weights. Raises `LearnerLost`."""
        started = time.perf_counter()
        meta, weights = await self._learner.weights(tag)
        version = PolicyVersion(number=meta["number"], tag=tag, checksum=meta["checksum"], weights=weights)
        self.sync_s += time.perf_counter() - started
        return version

    @staticmethod
    def missing(slot: WorkerSlot, version: PolicyVersion) -> ray.ObjectRef | None:
        """The weights that the slot's worker must load before it can draw with `version`. None: it holds them already.
        Given to a call as they are, Ray brings them to the worker's node while it still does something else."""
        return None if slot.confirmed == version.key else version.weights

    def confirmed(self, slot: WorkerSlot, version: PolicyVersion, seconds: float) -> None:
        """The slot's worker holds `version`; it took `seconds` to load and check it."""
        slot.confirmed = version.key
        self.sync_s = max(self.sync_s, seconds)

    def drain_sync(self) -> float:
        seconds, self.sync_s = self.sync_s, 0.0
        return seconds
