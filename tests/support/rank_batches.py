"""Batches of groups for learners of one and of several ranks."""

from __future__ import annotations

import numpy as np

from pipeline.core.types import Feedback, GroupBatch, PromptItem
from pipeline.generators.policy import Policy
from pipeline.rl.group_plan import train_work

PROMPT = PromptItem(index=0, text="a red circle")


def batches(cfg, steps: int) -> list[list[GroupBatch]]:
    """All drawn with the starting policy: later steps are off-policy, which the comparison does not mind."""
    policy = Policy.load(cfg, "cpu", threads=1)
    policy.probe()
    policy.add_adapters()
    all_groups = []
    for step in range(steps):
        groups = []
        for i in range(cfg.step.groups):
            work = train_work(cfg, step * cfg.step.groups + i, step, PROMPT)
            media, trajectory, _ = policy.rollout(work)
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
