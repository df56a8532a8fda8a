"""Extremes: of a group, or of each of its branches, only the best and the worst takes train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from pipeline.config.schema import Config
from pipeline.config.sections.base import Count, Natural, NonNegative
from pipeline.config.sections.rewards import RewardConfig
from pipeline.core.errors import ConfigError
from pipeline.core.types import Feedback
from pipeline.rl.signals.advantages import Advantages, AdvantageState
from pipeline.rl.signals.base import Scores, SignalResult, register


@register("extremes")
class Extremes(Advantages):
    """DanceGRPO's best-of-N (arXiv 2505.07818): advantages among all takes of a group, then only its best and worst
    ones train. They are not normalised again; the others get no gradient, and the mean is over those that train.

    B2-DiffuRL (arXiv 2503.11240): the best and the worst of every branch, unless they are near the group's mean."""

    best: Count = Field(4, description="Takes with the highest advantages that train.")
    worst: Count = Field(4, description="Takes with the lowest advantages that train.")
    branch: Natural = Field(
        0,
        description="Choose among each so many takes, which sampler.same_initial_noise lets begin alike; 0: among all "
        "of a group.",
    )
    least: NonNegative = Field(0.0, description="Chosen takes with an absolute advantage below this do not train.")

    def describe(self) -> str:
        whole = "branch" if self.branch else "group"
        return (
            f"{super().describe()} Of each {whole} the {self.best} best and the {self.worst} worst takes are trained."
        )

    def check(self, cfg: Config) -> None:
        takes, key = (self.branch, "signal.branch") if self.branch else (cfg.step.takes, "step.takes")
        if self.best + self.worst > takes:
            raise ConfigError(
                f"signal.best: {self.best} best and {self.worst} worst takes are more than {key} ({takes}); lower "
                "signal.best and signal.worst, or draw more takes"
            )
        shared = cfg.sampler.same_initial_noise
        if self.branch and (shared is True or shared != self.branch):
            raise ConfigError(
                f"signal.branch: found {self.branch}; takes of a branch begin alike: set "
                f"sampler.same_initial_noise={self.branch} (found {str(shared).lower()}), or signal.branch=0"
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
    size = options.branch or len(advantages)
    chosen = np.zeros(len(advantages), bool)
    for start in range(0, len(advantages), size):
        order = start + np.argsort(advantages[start : start + size], kind="stable")
        worst, best = order[: options.worst], order[len(order) - options.best :]
        chosen[worst] = advantages[worst] <= -options.least
        chosen[best] = advantages[best] >= options.least
    return Feedback(advantages=advantages * chosen * (len(advantages) / max(1, chosen.sum())))
