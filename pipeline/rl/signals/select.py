"""Select: the best takes of a group are kept as examples, the others are not trained (rejection sampling).

Takes of data that come with labels weigh as much as these say: real pictures among one's own best takes (source mix),
or the better take of a labelled pair (source labelled).
"""

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
from pipeline.rl.signals.base import LABEL, Scores, SignalResult, register


@register("select")
class Select(Advantages):
    """Keep the best takes of each group (RAFT, arXiv 2304.06767): they weigh 1 on average over the group, the others 0.

    With an objective on finished takes this is fine-tuning on one's own best takes."""

    reads = frozenset({"rewards", "labels"})

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
        scored = [group for group in groups if LABEL not in group]
        result = super().step(scored) if scored else SignalResult([], {})
        best = iter(result.feedback)
        feedback = [_labelled(group) if LABEL in group else self._best(next(best)) for group in groups]
        return replace(result, feedback=feedback)

    def is_flat(self, group: Scores) -> bool:
        return LABEL not in group and super().is_flat(group)

    def _best(self, feedback: Feedback) -> Feedback:
        assert feedback.advantages is not None  # what the parent gives
        weights = np.zeros_like(feedback.advantages)
        chosen = np.argsort(-feedback.advantages, kind="stable")[: self.options.keep]
        weights[chosen] = len(weights) / self.options.keep
        return Feedback(advantages=weights)


def _labelled(group: Scores) -> Feedback:
    """The labels of a group's takes, not all 0, as weights that are 1 on average."""
    labels = group[LABEL].values
    return Feedback(advantages=labels / labels.mean())
