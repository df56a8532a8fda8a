"""A rollout worker: one policy that draws groups of takes. Thin; the work is in `pipeline.generators.policy`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import ray

from actors.common import RoleActor, cores, use_threads
from pipeline.types import GroupWork, Media, PolicyVersion, PromptItem, RolloutMeta, Trajectory, WeightSet

_NICE = 5  # where they share cores, the learner comes first: there is only one, and its chain of groups is the longest


class RolloutWorker(RoleActor):
    """Draws a group only with the very version it was told to use and has confirmed."""

    role = "rollout"
    hands_back = True

    def start(self, prompts: list[PromptItem]) -> dict[str, Any]:
        """Loads and probes the generator (with these prompts). Raises `RushesError` when it cannot be a policy."""
        from pipeline.generators.policy import Policy

        rollout = self.cfg.rollout
        with self.doing("starting"):
            threads = rollout.threads or max(1, cores() // rollout.workers.max)
            use_threads(threads)
            self.policy = Policy.load(self.cfg, rollout.device, threads)
            if self.policy.device.type == "cpu":
                os.nice(_NICE)
            report = self.policy.probe(prompts)
            self.policy.attach()
            self.held: tuple[int, str] | None = None
            self.log.info("ready: %s", report)
        return {**self.info(), "probe": report, "device": str(self.policy.device)}

    def load(self, version: PolicyVersion) -> str:
        """Fetches and applies a version. Returns the checksum of the weights that the policy now holds."""
        with self.doing(f"loading version {version.number} ({version.tag})"):
            self.held = None
            weights: WeightSet = ray.get(version.weights)
            found = self.policy.load_weights(weights)
            self.policy.version = version.number
            self.held = (version.number, version.tag)
        return found

    def generate(self, works: list[GroupWork], number: int, tag: str) -> tuple[Any, ...]:
        """Draws groups: (their metas, media and trajectory of the first, of the second, ...), as separate objects. The
        caller owns them."""
        groups = ", ".join(str(work.group) for work in works)
        with self.doing(f"generating {works[0].purpose} group {groups}", works[0].group):
            if self.held != (number, tag):
                raise RuntimeError(f"asked for version {number} ({tag}), holding {self.held}")
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
                    )
                )
                objects += [media, trajectory]
        return metas, *objects


def _bytes(trajectory: Trajectory | None) -> int:
    """Size of the large arrays: samples and step-invariant inputs."""
    if trajectory is None:
        return 0
    total = 0
    for part in trajectory.parts:
        total += sum(packed.data.nbytes for packed in part.shared)
        total += sum(step.sample.data.nbytes + step.next_sample.data.nbytes for step in part.steps)
    return total
