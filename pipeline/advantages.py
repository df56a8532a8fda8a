"""Group-relative advantages from one or several rewards.

Rewards stay a vector (name -> [K]) until here; this is the only place where they become one number. A reward that does
not apply to a group's prompt is not in the group's mapping: it is absent, never 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config import AdvantageConfig

Group = Mapping[str, np.ndarray]  # reward name -> float [K]


@dataclass(frozen=True, slots=True)
class AdvantageResult:
    """Per group, in the order given: advantages float32 [K], weighted rewards float32 [K], equal-reward flags."""

    advantages: list[np.ndarray]
    rewards: list[np.ndarray]
    zero_std: list[bool]
    metrics: dict[str, float]


def weighted_rewards(scores: Group, weights: Mapping[str, float]) -> np.ndarray:
    """sum_k weight_k * reward_k over the rewards that apply -> float32 [K].

    A reward that is missing from `scores`, or NaN for a take, does not apply to it. Raises ValueError where none does.
    """
    terms = np.stack([weights[name] * np.asarray(scores[name], np.float64) for name in weights if name in scores])
    known = ~np.isnan(terms)
    if not known.any(axis=0).all():
        raise ValueError("no reward applies to some take")
    return np.sum(np.where(known, terms, 0.0), axis=0).astype(np.float32)


def is_zero_std(rewards: np.ndarray) -> bool:
    """True when the takes cannot be told apart: spread below float32 noise of the rewards' size."""
    return float(np.ptp(rewards)) <= 1e-6 * max(1.0, float(np.abs(rewards).max()))


def non_dominated(values: np.ndarray) -> np.ndarray:
    """The Pareto set of takes, bool [K], of `values` [R, K] (higher is better in each of R rewards).

    Take a dominates take b if it is at least as good in all rewards and better in one (Parrot, arXiv 2401.05675).
    """
    no_worse = (values[:, :, None] >= values[:, None, :]).all(axis=0)  # [a, b]
    better = (values[:, :, None] > values[:, None, :]).any(axis=0)
    return np.logical_not(np.any(no_worse & better, axis=0))


@dataclass(frozen=True, slots=True)
class _Normalised:
    advantages: np.ndarray  # float64 [K]
    scale: float  # the std (+ eps) of one unit of advantage, in the units of the rewards


def _normalise(
    groups: Sequence[np.ndarray], cfg: AdvantageConfig, kinds: Sequence[Hashable] | None = None
) -> list[_Normalised]:
    """(r - mean_group) / (std + eps); std (population) of the group, or of all takes of the step in groups of the same
    kind: sums of different rewards have no common scale."""
    groups = [np.asarray(group, np.float64) for group in groups]
    kinds = [None] * len(groups) if kinds is None else list(kinds)
    whole = {
        kind: float(np.concatenate([g for g, k in zip(groups, kinds, strict=True) if k == kind]).std())
        for kind in set(kinds)
    }
    result = []
    for kind, rewards in zip(kinds, groups, strict=True):
        centred = rewards - rewards.mean()
        scale = (whole[kind] if cfg.std == "global" else float(rewards.std())) + cfg.eps
        if cfg.std != "none":
            centred = np.zeros_like(rewards) if is_zero_std(rewards) else centred / scale
        result.append(_Normalised(centred, scale))
    return result


def _trust(variances: np.ndarray | None, scale: float) -> np.ndarray | float:
    """exp(-u), u = variance of a take's repeated scores in units of the spread within its group, squared (Ctrl-U,
    arXiv 2410.11236: exp(-u) lowers the weight of uncertain rewards). [K], or 1 without repeats."""
    return 1.0 if variances is None else np.exp(-np.asarray(variances, np.float64) / scale**2)


def compute_advantages(
    scores: Sequence[Group],
    weights: Mapping[str, float],
    cfg: AdvantageConfig,
    *,
    prepared: Sequence[Group] | None = None,
    variances: Sequence[Group] | None = None,
) -> AdvantageResult:
    """`scores`: one dict (reward name -> [K]) per group, with the rewards that apply to its prompt.

    `prepared`: what is combined instead of the scores (normalised, clipped); the scores themselves are then only
    logged. `variances`: per group, of a take's repeated scores, for the rewards that were repeated, in the units of
    `prepared`. Raises ValueError on NaN, or on a group without rewards.
    """
    if not scores:
        raise ValueError("no groups to compute advantages of")
    for group in scores:
        for name, values in group.items():
            if not np.isfinite(values).all():
                raise ValueError(f"reward {name} is not finite; a failed score must fail its group, not be averaged")
        if not any(name in group for name in weights):
            raise ValueError("no reward applies to a group")
    prepared = scores if prepared is None else prepared
    variances = [{}] * len(scores) if variances is None else variances
    rewards = [weighted_rewards(group, weights) for group in scores]
    combined = _sum_rewards if cfg.combine == "rewards" else _sum_advantages
    raw, zero, combining = combined(prepared, variances, weights, cfg)
    advantages = [group.astype(np.float32) for group in raw]
    flat = np.concatenate(rewards)
    metrics = {
        "reward/mean": float(flat.mean()),
        "reward/std": float(np.mean([group.std() for group in rewards])),
        "zero_std_ratio": float(np.mean(zero)),
        "advantage/mean_abs": float(np.mean([np.abs(group).mean() for group in advantages])),
    }
    for name in weights:
        known = [np.asarray(group[name]) for group in scores if name in group]
        if known:
            metrics[f"reward/{name}"] = float(np.concatenate(known).mean())
        if len(known) < len(scores) or any(name not in group for group in scores):
            metrics[f"combine/applies/{name}"] = len(known) / len(scores)
    return AdvantageResult(advantages, rewards, zero, metrics | combining)


Combined = tuple[list[np.ndarray], list[bool], dict[str, float]]


def _sum_rewards(
    groups: Sequence[Group], variances: Sequence[Group], weights: Mapping[str, float], cfg: AdvantageConfig
) -> Combined:
    """The advantages of the weighted sum of rewards."""
    totals = [weighted_rewards(group, weights) for group in groups]
    kinds = [tuple(name for name in weights if name in group) for group in groups]
    raw, trusts = [], []
    for result, variance in zip(_normalise(totals, cfg, kinds), variances, strict=True):
        terms = [weights[name] ** 2 * np.asarray(variance[name], np.float64) for name in weights if name in variance]
        trust = _trust(np.sum(terms, axis=0) if terms else None, result.scale)
        trusts += [np.atleast_1d(trust)] if terms else []
        raw.append(np.clip(result.advantages * trust, -cfg.clamp, cfg.clamp))
    parts = [{name: weights[name] * np.asarray(group[name]) for name in weights if name in group} for group in groups]
    metrics = _shares(parts)
    if trusts:
        metrics["combine/trust"] = float(np.concatenate(trusts).mean())
    return raw, [is_zero_std(total) for total in totals], metrics


def _sum_advantages(
    groups: Sequence[Group], variances: Sequence[Group], weights: Mapping[str, float], cfg: AdvantageConfig
) -> Combined:
    """The weighted sum of each reward's own advantages; `pareto`: kept for the non-dominated takes of a group."""
    parts: list[dict[str, np.ndarray]] = [{} for _ in groups]
    metrics: dict[str, float] = {}
    for name in weights:
        having = [i for i, group in enumerate(groups) if name in group]
        trusts = []
        for i, result in zip(having, _normalise([groups[i][name] for i in having], cfg), strict=True):
            trust = _trust(variances[i].get(name), result.scale)
            trusts += [np.atleast_1d(trust)] if name in variances[i] else []
            parts[i][name] = weights[name] * result.advantages * trust
        if trusts:
            metrics[f"combine/trust/{name}"] = float(np.concatenate(trusts).mean())
    raw = [np.clip(np.sum(list(part.values()), axis=0), -cfg.clamp, cfg.clamp) for part in parts]
    # Not of the sum: rewards of unequal weight may add up to a constant and still have advantages.
    zero = [
        all(is_zero_std(np.asarray(group[name])) for name in part if weights[name])
        for group, part in zip(groups, parts, strict=True)
    ]
    if cfg.combine == "pareto":
        chosen = [_pareto(group, weights) for group in groups]
        # The learner averages over K takes, Parrot over the n(P) that are kept.
        raw = [group * keep * (len(keep) / keep.sum()) for group, keep in zip(raw, chosen, strict=True)]
        metrics["combine/non_dominated"] = float(np.concatenate(chosen).mean())
    return raw, zero, metrics | _shares(parts)


def _pareto(group: Group, weights: Mapping[str, float]) -> np.ndarray:
    """bool [K]. A reward of negative weight is better where it is lower; one of weight 0 does not count."""
    named = [np.sign(weights[name]) * np.asarray(group[name]) for name in weights if name in group and weights[name]]
    return non_dominated(np.stack(named)) if named else np.ones(len(next(iter(group.values()))), bool)


def _shares(parts: Sequence[Group]) -> dict[str, float]:
    """Each reward's share of the spread within groups, averaged over the groups that have it: who decides."""
    found: dict[str, list[float]] = {}
    for group in parts:
        spread = {name: float(np.std(values)) for name, values in group.items()}
        total = sum(spread.values())
        for name, value in spread.items() if len(spread) > 1 and total > 0 else ():
            found.setdefault(name, []).append(value / total)
    return {f"combine/share/{name}": float(np.mean(shares)) for name, shares in found.items()}
