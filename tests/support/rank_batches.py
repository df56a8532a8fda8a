"""Batches of groups for learners of one and of several ranks."""

from __future__ import annotations

import numpy as np

from pipeline.core.types import Feedback, GroupBatch, PromptItem
from pipeline.generators.policy import Policy
from pipeline.rl.group_plan import train_work
from pipeline.rl.signals import signal_of
from pipeline.rl.signals.base import labels_of
from pipeline.rl.sources import source_of

PROMPT = PromptItem(index=0, text="a red circle")


def batches(cfg, steps: int) -> list[list[GroupBatch]]:
    """All drawn with the starting policy, or given: later steps are off-policy, which the comparison does not mind."""
    policy = Policy.load(cfg, "cpu", threads=1)
    policy.probe()
    policy.add_adapters()
    all_groups = []
    for step in range(steps):
        groups = []
        for i in range(cfg.step.groups):
            number = step * cfg.step.groups + i
            work = train_work(cfg, number, step, PROMPT)
            if not source_of(cfg).draws:
                rows = source_of(cfg).rows(cfg)
                work = source_of(cfg).work(cfg, number, step, rows[number % len(rows)])
            media, trajectory, _ = policy.rollout(work)
            if (labels := labels_of(work)) is not None:
                (feedback,) = signal_of(cfg).begin(cfg.rewards).step([labels]).feedback
                groups.append(GroupBatch(trajectory=trajectory, feedback=feedback))
                continue
            brightness = media.frames.reshape(len(media.frames), -1).mean(1)
            advantages = (brightness - brightness.mean()) / (brightness.std() + 1e-4)
            best, worst = advantages.argmax(), advantages.argmin()
            feedback = Feedback(
                advantages=advantages.astype(np.float32),
                pairs=np.array([[best, worst]]),
                pair_weights=np.ones(1, np.float32),
                pair_gaps=np.array([advantages[best] - advantages[worst]], np.float32),
            )
            groups.append(GroupBatch(trajectory=trajectory, feedback=feedback, prompts=work.prompts))
        all_groups.append(groups)
    return all_groups
