"""What an evaluation on held-out prompts found, and what has changed between two of them.

The takes of two evaluations are pairs (the same prompts and seeds), so every change is a mean of differences by prompt,
with one standard error and one interval: those of `pipeline.core.statistics`. Runs, `rushes evaluate`, reports,
summaries and trackers all take them from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.core.statistics import Estimate, estimate_of_means, prompt_means
from pipeline.rl.signals.group_relative import weighted_rewards


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """A mean over held-out prompts, and each prompt's own (NaN: it does not apply to the prompt)."""

    estimate: Estimate
    by_prompt: np.ndarray  # float64 [P]

    def record(self) -> dict[str, Any]:
        means = [None if np.isnan(value) else float(value) for value in self.by_prompt]
        return {**asdict(self.estimate), "prompt_means": means}


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary:
    """`reward`: the weighted sum of all rewards. `rewards`: each reward that applies to some take. `guards`: each
    measurement of `pipeline.rewards.guards`."""

    prompts: tuple[int, ...]  # indices of the P prompts
    reward: Heldout
    rewards: dict[str, Heldout]
    guards: dict[str, Heldout]
    takes: int

    def record(self) -> dict[str, Any]:
        """A line of evals.jsonl, but for its step and tag."""
        return {
            **self.reward.record(),
            "prompts": list(self.prompts),
            "takes": self.takes,
            "rewards": {name: value.record() for name, value in self.rewards.items()},
            "guards": {name: value.record() for name, value in self.guards.items()},
        }


def summarise_scores(
    scores: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    prompts: np.ndarray,
    guards: Mapping[str, np.ndarray] | None = None,
) -> EvaluationSummary:
    """`scores`: reward -> [N] of all takes, NaN where it does not apply; `prompts`: their prompts' indices [N];
    `guards`: measurement -> [N], NaN where there is none."""
    reward = weighted_rewards(scores, weights)
    measured = {name: scores[name] for name in weights}
    return EvaluationSummary(
        prompts=tuple(int(prompt) for prompt in np.unique(prompts)),
        reward=_heldout(reward, prompts),
        rewards={name: _heldout(values, prompts) for name, values in measured.items() if not np.isnan(values).all()},
        guards={name: _heldout(values, prompts) for name, values in (guards or {}).items()},
        takes=len(reward),
    )


def _heldout(values: np.ndarray, prompts: np.ndarray) -> Heldout:
    by_prompt = prompt_means(values, prompts)
    return Heldout(estimate=estimate_of_means(by_prompt[~np.isnan(by_prompt)]), by_prompt=by_prompt)


# ------------------------------------------------------------------------------------------------- two evaluations


@dataclass(frozen=True, kw_only=True)
class Changes:
    """after - before. A reward or guard that one of both has not measured on the same prompts is left out."""

    reward: Estimate | None
    rewards: dict[str, Estimate] = field(default_factory=dict)
    guards: dict[str, Estimate] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """What has changed between two records (`EvaluationSummary.record`) of takes with the same seeds."""
    parts: dict[str, dict[str, Estimate]] = {}
    for part in ("rewards", "guards"):
        first, last = before.get(part) or {}, after.get(part) or {}
        pairs = {name: _difference(before, first[name], after, last[name]) for name in last if name in first}
        parts[part] = {name: difference for name, difference in pairs.items() if difference is not None}
    return Changes(reward=paired_difference(before, after), **parts)


def paired_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> Estimate | None:
    """after - before of the weighted reward of two records; None if they have no prompts in common."""
    return _difference(before, before, after, after)


def _difference(
    before: Mapping[str, Any], first: Mapping[str, Any], after: Mapping[str, Any], last: Mapping[str, Any]
) -> Estimate | None:
    """`first`, `last`: what of the records is compared."""
    numbered = "prompts" in before and "prompts" in after
    if not numbered and len(first.get("prompt_means") or []) != len(last.get("prompt_means") or []):
        return None
    old, new = _by_prompt(before, first), _by_prompt(after, last)
    differences = [new[prompt] - old[prompt] for prompt in new if prompt in old]
    return estimate_of_means(np.asarray(differences)) if differences else None


def _by_prompt(record: Mapping[str, Any], part: Mapping[str, Any]) -> dict[int, float]:
    """Prompt -> mean, of a part of a record. Records of earlier versions number their prompts by place."""
    means = part.get("prompt_means") or []
    prompts = record.get("prompts") or range(len(means))
    return {prompt: mean for prompt, mean in zip(prompts, means, strict=False) if mean is not None}
