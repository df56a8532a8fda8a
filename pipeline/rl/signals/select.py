"""Select: the best takes of a group are kept as examples, the others are not trained (rejection sampling)."""

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


@register("select")
class Select(Advantages):
    """Keep the best takes of each group (RAFT, arXiv 2304.06767): they weigh 1 on average over the group, the others 0.

    With an objective on finished takes this is fine-tuning on one's own best takes."""

    keep: Count = Field(1, description="Takes of a group that are kept, by their advantage.")

    @property
    def drops_flat_groups(self) -> bool:
        return True

    def describe(self) -> str:
        return f"{super().describe()} The {self.keep} best of a group are trained on, with equal weight."

    def check(self, cfg: Config) -> None:
        if self.keep >= cfg.step.takes:
            raise ConfigError(f"signal.keep: found {self.keep}; expected less than step.takes ({cfg.step.takes})")

    def begin(self, rewards: Mapping[str, RewardConfig]) -> SelectState:
        return SelectState(rewards, self)


class SelectState(AdvantageState):
    options: Select

    def step(self, groups: Sequence[Scores]) -> SignalResult:
        result = super().step(groups)
        return replace(result, feedback=[self._best(feedback) for feedback in result.feedback])

    def _best(self, feedback: Feedback) -> Feedback:
        assert feedback.advantages is not None  # what the parent gives
        weights = np.zeros_like(feedback.advantages)
        chosen = np.argsort(-feedback.advantages, kind="stable")[: self.options.keep]
        weights[chosen] = len(weights) / self.options.keep
        return Feedback(advantages=weights)
