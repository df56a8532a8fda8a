"""A rollout worker: an actor around one policy that draws groups of takes (`pipeline.generators.policy`)."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from actors.ray_options import cores, from_bytes
from actors.role_actor import RoleActor, use_threads
from pipeline.core.types import GroupWork, Media, MicroBatchSpec, PromptItem, RolloutMeta, Trajectory, WeightSet

_NICE = 5  # the learner is the critical path; where they share cores, let it win the CPU


class ChecksumMismatch(RuntimeError):
    """The weights that a worker holds are not those that were published."""


class RolloutWorker(RoleActor):
    """Draws a group only with the version it is told to use, after checking the checksum of the weights it holds."""

    role = "rollout"
    drains_on_sigterm = True

    def start(self, prompts: list[PromptItem]) -> dict[str, Any]:
        """Loads the generator and probes it with `prompts`. The answer's `grid` holds the noise levels of its sampler
        steps (`NoiseGrid`). Raises `RushesError` when it cannot be a policy."""
        from pipeline.generators.policy import Policy

        rollout = self.cfg.rollout
        with self.doing("starting"):
            threads = rollout.threads or max(1, cores() // rollout.workers.max)
            use_threads(threads)
            self.policy = Policy.load(self.cfg, rollout.device, threads)
            if self.policy.device.type == "cpu":
                os.nice(_NICE)
            report = self.policy.probe(prompts)
            self.policy.add_adapters()
            self.held: tuple[int, str, str] | None = None  # key of the version
            self.log.info("ready: %s", report)
        return {**self.info(), "probe": report, "grid": self.policy.grid, "device": str(self.policy.device)}

    def generate(self, request: bytes, weights: WeightSet | None) -> tuple[Any, ...]:
        """Draws groups with one policy version.

        `request`: `to_bytes` of (list[GroupWork], key of the version). `weights`: of the version; None when this worker
        holds them already. Returns (metas, media and trajectory of the first group, of the second, ...) as separate
        objects, which the caller owns. Raises `ChecksumMismatch` when the weights are not those that were published.
        """
        from pipeline.rewards.guards import measure

        works: list[GroupWork]
        works, key = from_bytes(request)
        loaded_s = self._load(key, weights) if weights is not None and self.held != key else 0.0
        groups = ", ".join(str(work.group) for work in works)
        with self.doing(f"generating {works[0].purpose} group {groups}", works[0].group):
            if self.held != key:
                raise RuntimeError(f"version {key} is to be used, but this worker is holding {self.held}")
            number = key[0]
            metas: list[RolloutMeta] = []
            objects: list[Media | Trajectory | None] = []
            for work, (media, trajectory, seconds) in zip(works, self.policy.rollouts(works), strict=True):
                self.metrics.takes(len(media.frames))
                if trajectory is not None and trajectory.version != number:
                    trajectory = replace(trajectory, version=number)
                metas.append(
                    RolloutMeta(
                        group=work.group,
                        attempt=work.attempt,
                        version=number,
                        worker=self.name,
                        seconds=seconds,
                        trajectory_bytes=_bytes(trajectory),
                        media_bytes=media.frames.nbytes,
                        micro_batches=self._micro_batches(trajectory),
                        measured=measure(media) if work.purpose == "eval" else None,
                    )
                )
                objects += [media, trajectory]
        metas[0].seconds["load"] = loaded_s
        return metas, *objects

    def _micro_batches(self, trajectory: Trajectory | None) -> tuple[MicroBatchSpec, ...] | None:
        if trajectory is None or self.cfg.learner.ranks == 1:
            return None
        from pipeline.learner.micro_batch import micro_batch_specs

        return micro_batch_specs(self.cfg, trajectory)

    def _load(self, key: tuple[int, str, str], weights: WeightSet) -> float:
        """Loads a version, and computes the checksum again from what the policy then holds. Returns the seconds."""
        number, tag, published = key
        with self.doing(f"loading version {number} ({tag})"):
            started = time.perf_counter()
            self.held = None
            checksum = self.policy.load_weights(weights)
            if checksum != published:
                raise ChecksumMismatch(
                    f"version {number} ({tag}): holds weights {checksum}, published were {published}"
                )
            self.policy.version = number
            self.held = key
        return time.perf_counter() - started


def _bytes(trajectory: Trajectory | None) -> int:
    """Size of the large arrays: samples and step-invariant inputs."""
    if trajectory is None:
        return 0
    total = 0
    for part in trajectory.parts:
        total += sum(packed.data.nbytes for packed in part.shared)
        total += sum(step.sample.data.nbytes + step.next_sample.data.nbytes for step in part.steps)
    return total
