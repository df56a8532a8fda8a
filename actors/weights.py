"""Policy versions on their way from the learner to the workers.

The controller asks the learner for the weights and so owns the reference: a version outlives any worker. Workers pull
it (one object, shared by all workers of a node), recompute the checksum from what they hold, and get work only then.
"""

from __future__ import annotations

import time
from typing import Literal

from actors.learner_group import LearnerGroup
from actors.pool import Slot
from pipeline.types import PolicyVersion


class ChecksumMismatch(RuntimeError):
    """A worker holds other weights than were published."""


class Publisher:
    """Fetches versions from the learner and brings workers up to them."""

    def __init__(self, learner: LearnerGroup) -> None:
        self._learner = learner
        self._train: PolicyVersion | None = None
        self.sync_s = 0.0  # longest a worker took to load and confirm since `drain_sync`

    @property
    def train(self) -> PolicyVersion:
        """The newest version for training rollouts."""
        if self._train is None:
            raise RuntimeError("no version has been fetched yet")
        return self._train

    async def fetch(self, tag: Literal["train", "ema"]) -> PolicyVersion:
        """A new version from the learner's present weights; `train` becomes the newest one for rollouts.

        Raises `LearnerLost`.
        """
        started = time.perf_counter()
        meta, weights = await self._learner.weights(tag)
        version = PolicyVersion(number=meta["number"], tag=tag, checksum=meta["checksum"], weights=weights)
        if tag == "train":
            self._train = version
        self.sync_s += time.perf_counter() - started
        return version

    async def confirm(self, slot: Slot, version: PolicyVersion) -> None:
        """Returns once the slot's worker holds `version`. Raises `ChecksumMismatch`, or what the worker raised."""
        wanted = (version.number, version.tag, version.checksum)
        if slot.confirmed == wanted:
            return
        started = time.perf_counter()
        slot.confirmed = None
        slot.doing = f"loading version {version.number}"
        found = await slot.actor.load.remote(version)
        if found != version.checksum:
            raise ChecksumMismatch(
                f"version {version.number} ({version.tag}): holds weights {found}, published were {version.checksum}"
            )
        slot.confirmed = wanted
        self.sync_s = max(self.sync_s, time.perf_counter() - started)

    def drain_sync(self) -> float:
        seconds, self.sync_s = self.sync_s, 0.0
        return seconds
