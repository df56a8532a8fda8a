"""No signal: what the takes teach does not come from comparing their scores. Rewards are watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.config.sections.rewards import RewardConfig
from pipeline.core.types import Feedback
from pipeline.rl.signals.base import Scores, Signal, SignalResult, SignalState, register


@register("none")
class NoSignal(Signal):
    """For objectives that need none, such as reward_gradient. Scores of training takes are logged only."""

    gives = "none"

    def describe(self) -> str:
        return "Scores are watched; takes are not compared."

    def needs_whole_step(self, rewards: Mapping[str, RewardConfig]) -> bool:
        return False

    def begin(self, rewards: Mapping[str, RewardConfig]) -> NoSignalState:
        return NoSignalState()


class NoSignalState(SignalState):
    def step(self, groups: Sequence[Scores]) -> SignalResult:
        names = dict.fromkeys(name for group in groups for name in group)
        values = {name: np.concatenate([group[name].values for group in groups if name in group]) for name in names}
        applies = {name: each[~np.isnan(each)] for name, each in values.items()}
        metrics = {f"reward/{name}": float(each.mean()) for name, each in applies.items() if each.size}
        return SignalResult([Feedback() for _ in groups], metrics)

    def is_flat(self, group: Scores) -> bool:
        return False
