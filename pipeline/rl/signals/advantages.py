"""Group-relative advantages: how much better a take is than the other takes of its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from pipeline.config.sections.base import Positive
from pipeline.config.sections.rewards import RewardConfig
from pipeline.core.types import Feedback
from pipeline.rl.signals.base import Scores, Signal, SignalResult, register
from pipeline.rl.signals.group_relative import AdvantageResult, compute_advantages
from pipeline.rl.signals.prepared_scores import PreparedScores, PreparedState


@register("advantages")
class Advantages(Signal):
    """Group-relative advantages of GRPO (arXiv 2402.03300): (reward - mean of the group) / std."""

    gives = "advantages"

    std: Literal["group", "global", "none"] = Field(
        "group", description="Divide by the std of the group, of the whole step, or not at all (Dr. GRPO)."
    )
    clamp: Positive = Field(5.0, description="Largest absolute advantage.")
    combine: Literal["rewards", "advantages", "pareto"] = Field(
        "rewards",
        description="Several rewards: weighted sum of the rewards; of each reward's advantages; or, as the latter, but "
        "training only takes that no other take of the group beats in every reward (pareto).",
    )
    zero_std: Literal["train", "filter"] = Field(
        "train", description="Groups of equal rewards: train (no policy gradient), or filter and admit another group."
    )

    def describe(self) -> str:
        return _RULES[self.combine]

    @property
    def drops_flat_groups(self) -> bool:
        return self.zero_std == "filter"

    def needs_whole_step(self, rewards: Mapping[str, RewardConfig]) -> bool:
        return self.std == "global" or super().needs_whole_step(rewards)

    def begin(self, rewards: Mapping[str, RewardConfig]) -> AdvantageState:
        return AdvantageState(rewards, self)


_RULES = {
    "rewards": "The advantage of the weighted sum of rewards.",
    "advantages": "The weighted sum of each reward's own advantages.",
    "pareto": "The weighted sum of each reward's own advantages, for the takes that no other of their group dominates; "
    "the others are not trained.",
}


class AdvantageState(PreparedState):
    def __init__(self, rewards: Mapping[str, RewardConfig], options: Advantages) -> None:
        super().__init__(rewards)
        self.options = options

    def step(self, groups: Sequence[Scores]) -> SignalResult:
        self._last = scores = self._preparation.prepare(groups)
        result = self._advantages(scores)
        return SignalResult(
            [Feedback(advantages=each) for each in result.advantages], {**result.metrics, **scores.metrics}
        )

    def is_flat(self, group: Scores) -> bool:
        return self._advantages(self._preparation.prepare([group])).zero_std[0]

    def _advantages(self, scores: PreparedScores) -> AdvantageResult:
        return compute_advantages(
            scores.raw, self._weights, self.options, prepared=scores.prepared, variances=scores.variances
        )
