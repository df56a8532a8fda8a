"""Extremes: of a group only the best and the worst takes train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from pipeline.config.schema import Config
from pipeline.config.sections.base import Count
from pipeline.config.sections.rewards import RewardConfig
from pipeline.core.errors import ConfigError
from pipeline.core.types import Feedback
from pipeline.rl.signals.advantages import Advantages, AdvantageState
from pipeline.rl.signals.base import Scores, SignalResult, register


@register("extremes")
class Extremes(Advantages):
    """DanceGRPO's best-of-N (arXiv 2505.07818): advantages among all takes of a group, then only its best and worst
    ones train. They are not normalised again; the others get no gradient, and the mean is over those that train."""

    best: Count = Field(4, description="Takes with the highest advantages that train.")
    worst: Count = Field(4, description="Takes with the lowest advantages that train.")

    def describe(self) -> str:
        return f"{super().describe()} Of each group the {self.best} best and the {self.worst} worst takes are trained."

    def check(self, cfg: Config) -> None:
        if self.best + self.worst > cfg.step.takes:
            raise ConfigError(
                f"signal.best: {self.best} best and {self.worst} worst takes are more than step.takes "
                f"({cfg.step.takes}); lower signal.best and signal.worst, or draw more takes"
            )

    def begin(self, rewards: Mapping[str, RewardConfig]) -> ExtremesState:
        return ExtremesState(rewards, self)


class ExtremesState(AdvantageState):
    options: Extremes

    def step(self, groups: Sequence[Scores]) -> SignalResult:
        result = super().step(groups)
        kept = [_kept(feedback, self.options) for feedback in result.feedback]
        return replace(result, feedback=kept)


def _kept(feedback: Feedback, options: Extremes) -> Feedback:
    """Advantages of the takes between the extremes are 0; the rest grows, since the learner averages over all takes."""
    advantages = feedback.advantages
    assert advantages is not None  # what the parent gives
    order = np.argsort(advantages, kind="stable")
    chosen = np.concatenate([order[: options.worst], order[len(order) - options.best :]])
    weights = np.zeros_like(advantages)
    weights[chosen] = len(advantages) / len(chosen)
    return Feedback(advantages=advantages * weights)
