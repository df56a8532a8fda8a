"""Pairs: which of two takes of a group is the better one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.config.sections.base import NonNegative
from pipeline.config.sections.rewards import RewardConfig
from pipeline.core.types import Feedback
from pipeline.rl.signals.base import Scores, Signal, SignalResult, register
from pipeline.rl.signals.group_relative import is_zero_std, weighted_rewards
from pipeline.rl.signals.prepared_scores import PreparedState


@register("pairs")
class Pairs(Signal):
    """Pairs of takes of a group, compared by the weighted sum of the rewards. A group of equal rewards has none, and
    another one is admitted in its place."""

    gives = "pairs"

    choose: Literal["best_worst", "all"] = Field("best_worst", description="The best take and the worst, or all pairs.")
    margin: NonNegative = Field(0.0, description="Pairs whose rewards differ by no more than this are left out.")
    weigh: Literal["equal", "gap"] = Field(
        "equal", description="Pairs of a group count equally, or as much as their rewards differ (GAPO)."
    )

    @property
    def drops_flat_groups(self) -> bool:
        return True

    def describe(self) -> str:
        return "Pairs of takes are compared by the weighted sum of rewards."

    def begin(self, rewards: Mapping[str, RewardConfig]) -> PairState:
        return PairState(rewards, self)


class PairState(PreparedState):
    def __init__(self, rewards: Mapping[str, RewardConfig], options: Pairs) -> None:
        super().__init__(rewards)
        self.options = options

    def step(self, groups: Sequence[Scores]) -> SignalResult:
        self._last = scores = self._preparation.prepare(groups)
        totals = [weighted_rewards(group, self._weights) for group in scores.prepared]
        feedback = [self._pairs(total) for total in totals]
        gaps = [
            float((total[each.pairs[:, 0]] - total[each.pairs[:, 1]]).mean())
            for total, each in zip(totals, feedback, strict=True)
            if each.pairs is not None and len(each.pairs)
        ]
        metrics = {
            "reward/mean": float(np.concatenate([weighted_rewards(g, self._weights) for g in scores.raw]).mean())
        }
        for name in self._weights:
            values = [group[name] for group in scores.raw if name in group]
            if values:
                metrics[f"reward/{name}"] = float(np.concatenate(values).mean())
        if gaps:
            metrics["pairs/gap"] = float(np.mean(gaps))
        return SignalResult(feedback, {**metrics, **scores.metrics})

    def _pairs(self, total: np.ndarray) -> Feedback:
        order = np.argsort(-total, kind="stable")
        if self.options.choose == "best_worst":
            pairs = np.array([[order[0], order[-1]]])
        else:
            pairs = np.array([[a, b] for i, a in enumerate(order) for b in order[i + 1 :]])
        gaps = total[pairs[:, 0]] - total[pairs[:, 1]]
        chosen = gaps > self.options.margin
        pairs, gaps = pairs[chosen], gaps[chosen]
        weights = gaps / gaps.mean() if self.options.weigh == "gap" and len(gaps) else np.ones(len(gaps))
        return Feedback(pairs=pairs.astype(np.int64), pair_weights=weights.astype(np.float32))

    def is_flat(self, group: Scores) -> bool:
        scores = self._preparation.prepare([group])
        total = weighted_rewards(scores.prepared[0], self._weights)
        return bool(is_zero_std(total)) or not len(self._pairs(total).pairs)  # type: ignore[arg-type]
