"""Group-relative advantages from one or several rewards.

Rewards stay a vector (name -> [K]) until here; this is the only place where they become one number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config import AdvantageConfig


@dataclass(frozen=True, slots=True)
class AdvantageResult:
    """Per group, in the order given: advantages float32 [K], weighted rewards float32 [K], equal-reward flags."""

    advantages: list[np.ndarray]
    rewards: list[np.ndarray]
    zero_std: list[bool]
    metrics: dict[str, float]


def weighted_rewards(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """sum_k weight_k * reward_k -> float32 [K]."""
    return np.sum([weights[name] * np.asarray(scores[name], np.float64) for name in weights], axis=0).astype(np.float32)


def is_zero_std(rewards: np.ndarray) -> bool:
    """True when the takes cannot be told apart: spread below float32 noise of the rewards' size."""
    return float(np.ptp(rewards)) <= 1e-6 * max(1.0, float(np.abs(rewards).max()))


def _normalise(groups: Sequence[np.ndarray], cfg: AdvantageConfig) -> list[np.ndarray]:
    """(r - mean_group) / (std + eps); std (population) of the group or of all takes of the step."""
    groups = [np.asarray(group, np.float64) for group in groups]
    centred = [group - group.mean() for group in groups]
    if cfg.std == "none":
        return centred
    whole = float(np.concatenate(groups).std())
    result = []
    for group, rewards in zip(centred, groups, strict=True):
        if is_zero_std(rewards):
            result.append(np.zeros_like(group))
        else:
            result.append(group / ((whole if cfg.std == "global" else float(rewards.std())) + cfg.eps))
    return result


def compute_advantages(
    scores: Sequence[Mapping[str, np.ndarray]], weights: Mapping[str, float], cfg: AdvantageConfig
) -> AdvantageResult:
    """`scores`: one dict (reward name -> [K]) per group. Raises ValueError on NaN or missing rewards."""
    if not scores:
        raise ValueError("no groups to compute advantages of")
    for group in scores:
        for name in weights:
            if not np.isfinite(group[name]).all():
                raise ValueError(f"reward {name} is not finite; a failed score must fail its group, not be averaged")
    rewards = [weighted_rewards(group, weights) for group in scores]
    if cfg.combine == "rewards":
        raw = _normalise(rewards, cfg)
    else:
        per_reward = {name: _normalise([group[name] for group in scores], cfg) for name in weights}
        raw = [np.sum([weights[name] * per_reward[name][i] for name in weights], axis=0) for i in range(len(scores))]
    advantages = [np.clip(group, -cfg.clamp, cfg.clamp).astype(np.float32) for group in raw]
    zero = [is_zero_std(group) for group in rewards]
    flat = np.concatenate(rewards)
    metrics = {
        "reward/mean": float(flat.mean()),
        "reward/std": float(np.mean([group.std() for group in rewards])),
        "zero_std_ratio": float(np.mean(zero)),
        "advantage/mean_abs": float(np.mean([np.abs(group).mean() for group in advantages])),
    }
    for name in weights:
        metrics[f"reward/{name}"] = float(np.concatenate([np.asarray(group[name]) for group in scores]).mean())
    return AdvantageResult(advantages, rewards, zero, metrics)
