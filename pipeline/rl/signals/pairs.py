"""Pairs: which of two takes of a group is the better one.

    RankDPO (arXiv 2410.18013)            choose=all, combine=wins, weigh=dcg
    GAPO (AnimeReward, arXiv 2504.10044)  choose=best_worst, weigh=exp_gap
    RPO (arXiv 2407.12164)                combine=harmonic; temperature: labels are drawn, as unsure people would answer
    SePPO (arXiv 2410.05255)              choose=best_others: one winner against every other take

The papers' pairs are of given pictures, or of several models' takes; here they are of a group's own takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.config.schema import Config
from pipeline.config.sections.base import NonNegative
from pipeline.config.sections.rewards import RewardConfig
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.types import Feedback
from pipeline.rl.signals.base import Scores, Signal, SignalResult, register
from pipeline.rl.signals.group_relative import Group, is_zero_std, weighted_rewards
from pipeline.rl.signals.prepared_scores import PreparedState


@register("pairs")
class Pairs(Signal):
    """Pairs of takes of a group, compared by their rewards. A group of equal rewards has none, and another one is
    admitted in its place."""

    gives = "pairs"

    choose: Literal["best_worst", "best_others", "all"] = Field(
        "best_worst", description="The best take and the worst; the best and every other one; or all pairs."
    )
    combine: Literal["rewards", "harmonic", "wins"] = Field(
        "rewards",
        description="What takes are compared by: the weighted sum of the rewards; their weighted harmonic mean, which "
        "the lowest one decides (RPO); or the share of the group's other takes that a take beats, averaged over the "
        "rewards by weight, whatever their scales (RankDPO).",
    )
    margin: NonNegative = Field(0.0, description="Pairs whose takes differ by no more than this are left out.")
    weigh: Literal["equal", "gap", "exp_gap", "dcg"] = Field(
        "equal",
        description="Pairs count equally; as much as their takes differ (gap); as 2 to the power of what they are "
        "compared by does (exp_gap: GAPO); or as the group's DCG would if they changed places (dcg: RankDPO). Relative "
        "to the step's mean.",
    )
    temperature: NonNegative = Field(
        0.0,
        description="Labels are drawn from Bradley-Terry: a take that is better by d is called the better one with "
        "probability sigmoid(d / temperature). 0: always.",
    )

    @property
    def drops_flat_groups(self) -> bool:
        return True

    def describe(self) -> str:
        compared = {
            "rewards": "the weighted sum of rewards",
            "harmonic": "the weighted harmonic mean of rewards",
            "wins": "their mean win rate over the rewards",
        }
        return f"Pairs of takes are compared by {compared[self.combine]}."

    def check(self, cfg: Config) -> None:
        for name, reward in cfg.rewards.items():
            if self.combine == "harmonic" and reward.weight < 0:
                raise ConfigError(
                    f"rewards.{name}.weight: found {reward.weight:g}; signal.combine=harmonic takes weights of 0 or "
                    "more: set one, or signal.combine=rewards"
                )

    def needs_whole_step(self, rewards: Mapping[str, RewardConfig]) -> bool:
        return self.weigh != "equal" or self.temperature > 0 or super().needs_whole_step(rewards)

    def begin(self, rewards: Mapping[str, RewardConfig]) -> PairState:
        return PairState(rewards, self)


_GROUPS = "pairs/groups"  # key of the state: groups trained so far
_LABELS = 0xB7  # the random stream that labels are drawn from


class PairState(PreparedState):
    def __init__(self, rewards: Mapping[str, RewardConfig], options: Pairs) -> None:
        super().__init__(rewards)
        self.options = options
        self._groups = 0  # trained so far: their number is a group's, whatever it has been retried or resumed

    def step(self, groups: Sequence[Scores]) -> SignalResult:
        self._last = scores = self._preparation.prepare(groups)
        values = [self._values(group) for group in scores.prepared]
        pairs = [self._pairs(each) for each in values]
        weights = [
            pair_weights(each, of_group, self.options.weigh) for each, of_group in zip(values, pairs, strict=True)
        ]
        mean = float(np.mean([each.mean() for each in weights if len(each)] or [1.0]))
        feedback = [
            self._labelled(self._groups + number, each, of_group, weight / mean)
            for number, (each, of_group, weight) in enumerate(zip(values, pairs, weights, strict=True))
        ]
        metrics = {
            "reward/mean": float(np.concatenate([weighted_rewards(g, self._weights) for g in scores.raw]).mean())
        }
        for name in self._weights:
            of_reward = [group[name] for group in scores.raw if name in group]
            if of_reward:
                metrics[f"reward/{name}"] = float(np.concatenate(of_reward).mean())
        gaps = [each.pair_gaps for each in feedback if each.pair_gaps is not None and len(each.pair_gaps)]
        if gaps:
            metrics["pairs/gap"] = float(np.mean([np.abs(each).mean() for each in gaps]))
        if gaps and self.options.temperature:
            metrics["pairs/swapped"] = float((np.concatenate(gaps) < 0).mean())
        return SignalResult(feedback, {**metrics, **scores.metrics})

    def _values(self, group: Group) -> np.ndarray:
        """What the takes are compared by [K]."""
        compared = {"rewards": weighted_rewards, "harmonic": harmonic_means, "wins": win_rates}
        return compared[self.options.combine](group, self._weights)

    def _pairs(self, values: np.ndarray) -> np.ndarray:
        """Int64 [P, 2], the better take first."""
        order = np.argsort(-values, kind="stable")
        if self.options.choose == "all":
            pairs = np.array([[a, b] for i, a in enumerate(order) for b in order[i + 1 :]])
        else:
            others = order[1:] if self.options.choose == "best_others" else order[-1:]
            pairs = np.array([[order[0], other] for other in others])
        return pairs[gaps_of(values, pairs) > self.options.margin].astype(np.int64)

    def _labelled(self, number: int, values: np.ndarray, pairs: np.ndarray, weights: np.ndarray) -> Feedback:
        """The pairs as they are taught. `number`: of the group in the run."""
        gaps = gaps_of(values, pairs)
        if self.options.temperature:
            rng = np.random.default_rng(np.random.SeedSequence([number, _LABELS]))
            agree = 0.5 + 0.5 * np.tanh(gaps / (2.0 * self.options.temperature))  # the sigmoid, without overflow
            swapped = rng.random(len(pairs)) >= agree
            pairs = np.where(swapped[:, None], pairs[:, ::-1], pairs)
        return Feedback(
            pairs=pairs,
            pair_weights=weights.astype(np.float32),
            pair_gaps=gaps_of(values, pairs).astype(np.float32),
        )

    def is_flat(self, group: Scores) -> bool:
        values = self._values(self._preparation.prepare([group]).prepared[0])
        return bool(is_zero_std(values)) or not len(self._pairs(values))

    def commit(self) -> None:
        super().commit()
        self._groups += len(self._last.raw) if self._last is not None else 0

    def state(self) -> dict[str, list[float]]:
        return {**super().state(), _GROUPS: [self._groups]}

    def load_state(self, state: Mapping[str, Sequence[float]] | None) -> None:
        try:
            running = dict(state or {})
            self._groups = int(running.pop(_GROUPS, [0])[0])
        except (TypeError, ValueError, IndexError):
            raise CheckpointError("the checkpoint's count of groups that were trained cannot be read") from None
        super().load_state(running)


def gaps_of(values: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """By how much the first takes of `pairs` [P, 2] are better, by `values` [K] -> [P]."""
    return values[pairs[:, 0]] - values[pairs[:, 1]]


def harmonic_means(scores: Group, weights: Mapping[str, float]) -> np.ndarray:
    """sum_k w_k / sum_k (w_k / r_k), float64 [K], over the rewards that apply and have a weight; 0 where one of them is
    0 or less. RPO's lambda-harmonic reward where the weights are lambda and 1 - lambda."""
    named = [name for name in weights if name in scores and weights[name]]
    if not named:
        return np.zeros(len(next(iter(scores.values()))))  # nothing tells the takes apart
    values = np.stack([np.asarray(scores[name], np.float64) for name in named])
    shares = np.array([weights[name] for name in named]) / sum(weights[name] for name in named)
    positive = (values > 0.0).all(axis=0)
    return np.where(positive, 1.0 / (shares[:, None] / np.where(positive, values, 1.0)).sum(axis=0), 0.0)


def win_rates(scores: Group, weights: Mapping[str, float]) -> np.ndarray:
    """RankDPO's phi, float64 [K] in 0..1: the share of the other takes that a take beats, a tie counting half, averaged
    over the rewards that apply by the size of their weights. Where a weight is negative, lower is better.
    """
    named = [name for name in weights if name in scores and weights[name]]
    if not named:
        return np.full(len(next(iter(scores.values()))), 0.5)  # nothing tells the takes apart
    values = np.stack([np.sign(weights[name]) * np.asarray(scores[name], np.float64) for name in named])
    wins = (values[:, :, None] > values[:, None, :]).astype(float)
    losses = (values[:, :, None] < values[:, None, :]).astype(float)
    beaten = (0.5 + 0.5 * (wins - losses)).sum(axis=2) - 0.5  # not itself
    return np.average(beaten / max(1, values.shape[1] - 1), axis=0, weights=[abs(weights[name]) for name in named])


def pair_weights(values: np.ndarray, pairs: np.ndarray, weigh: str) -> np.ndarray:
    """Float64 [P], as published, of `pairs` [P, 2] of takes with `values` [K].

    exp_gap: 2^s_w - 2^s_l. dcg: |G_w - G_l| |D_w - D_l|, G = 2^s - 1, D = 1 / log(1 + rank), the best take's rank 1.
    """
    if weigh == "equal":
        return np.ones(len(pairs))
    if weigh == "gap":
        return gaps_of(values, pairs)
    gains = gaps_of(np.exp2(values.astype(np.float64)), pairs)
    if weigh == "exp_gap":
        return gains
    rank = np.empty(len(values), np.int64)
    rank[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
    return np.abs(gains * gaps_of(1.0 / np.log1p(rank), pairs))
