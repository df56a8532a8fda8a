"""Scored groups and reward combiners for the tests of advantages, and takes of given brightness."""

from __future__ import annotations

import numpy as np

from pipeline.config.schema import RewardConfig
from pipeline.core.types import Feedback, GroupBatch, Media, RewardScores
from pipeline.rl.signals.advantages import Advantages, AdvantageState


def scored(**rewards):
    """One group: name=values, or name=(values, variance); None: the reward does not apply."""
    takes = len(next(v for v in rewards.values() if v is not None))
    scores = {}
    for name, entry in rewards.items():
        values, variance = entry if isinstance(entry, tuple) else (entry, None)
        values = np.full(takes, np.nan) if values is None else values
        variance = None if variance is None else np.asarray(variance, np.float32)
        scores[name] = RewardScores(values=np.asarray(values, np.float32), variance=variance)
    return scores


def combiner(rewards, **advantage):
    configs = {name: RewardConfig(scorer="x", **options) for name, options in rewards.items()}
    return AdvantageState(configs, Advantages(**{"clamp": 100, **advantage}))


def takes(levels, frames=1):
    shape = np.ones((1, frames, 8, 8, 3))
    return Media(frames=(np.asarray(levels).reshape(-1, 1, 1, 1, 1) * shape).astype(np.uint8), fps=8.0)


def advantages_of(result):
    """Per group."""
    return [feedback.advantages for feedback in result.feedback]


def group_batch(trajectory, advantages):
    """A group whose takes have these advantages, as the learner is given it."""
    return GroupBatch(trajectory=trajectory, feedback=Feedback(advantages=np.array(advantages, np.float32)))
