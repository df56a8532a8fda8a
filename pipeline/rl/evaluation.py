"""What an evaluation on held-out prompts found: the mean reward and each reward's, with their standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.core.statistics import Estimate, estimate, estimate_of_means, prompt_means
from pipeline.rl.signals.group_relative import weighted_rewards


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary:
    """`reward`: of the weighted sum of all rewards. `rewards`: of each reward that applies to some take."""

    reward: Estimate
    rewards: dict[str, Estimate]
    prompt_means: tuple[float, ...]  # of the weighted sum, by prompt index
    takes: int

    def record(self) -> dict[str, Any]:
        """A line of evals.jsonl, but for its step and tag."""
        return {
            **asdict(self.reward),
            "takes": self.takes,
            "rewards": {name: asdict(value) for name, value in self.rewards.items()},
            "prompt_means": list(self.prompt_means),
        }


def summarise_scores(
    scores: Mapping[str, np.ndarray], weights: Mapping[str, float], prompts: np.ndarray
) -> EvaluationSummary:
    """`scores`: reward -> [N] of all takes, NaN where it does not apply; `prompts`: their prompts' indices [N]."""
    reward = weighted_rewards(scores, weights)
    rewards = {}
    for name in weights:
        applies = ~np.isnan(scores[name])
        if applies.any():
            rewards[name] = estimate(scores[name][applies], prompts[applies])
    return EvaluationSummary(
        reward=estimate(reward, prompts),
        rewards=rewards,
        prompt_means=tuple(prompt_means(reward, prompts).tolist()),
        takes=len(reward),
    )


def paired_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> Estimate | None:
    """after - before of two records of the same prompts and seeds; None if the records do not have the same prompts."""
    first, last = before.get("prompt_means") or [], after.get("prompt_means") or []
    if not first or len(first) != len(last):
        return None
    return estimate_of_means(np.asarray(last) - np.asarray(first))
