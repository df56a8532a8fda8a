"""Labels: which take of a group is better is what the data says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.config.sections.rewards import RewardConfig
from pipeline.core.types import Feedback
from pipeline.rl.signals.base import LABEL, Scores, Signal, SignalResult, SignalState, register


@register("labels")
class Labels(Signal):
    """Pairs of a group's takes as their labels order them (source labelled). Rewards judge held-out takes only."""

    gives = "pairs"
    reads = frozenset({"labels"})

    def describe(self) -> str:
        return "Pairs of takes are ordered by their labels; rewards judge held-out takes only."

    def needs_whole_step(self, rewards: Mapping[str, RewardConfig]) -> bool:
        return False

    def begin(self, rewards: Mapping[str, RewardConfig]) -> LabelState:
        return LabelState()


class LabelState(SignalState):
    def step(self, groups: Sequence[Scores]) -> SignalResult:
        feedback = [_pairs(group[LABEL].values) for group in groups]
        return SignalResult(feedback, {})

    def is_flat(self, group: Scores) -> bool:
        return not len(_better(group[LABEL].values))


def _better(labels: np.ndarray) -> np.ndarray:
    """Int64 [P, 2]: a take and one with a lower label."""
    return np.argwhere(labels[:, None] > labels[None, :])


def _pairs(labels: np.ndarray) -> Feedback:
    pairs = _better(labels)
    return Feedback(pairs=pairs, pair_weights=np.ones(len(pairs), np.float32))
