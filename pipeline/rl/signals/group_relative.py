"""Group-relative advantages from one or several rewards.

Rewards stay a vector (name -> [K]) until here; this is the only place where they become one number. A reward that does
not apply to a group's prompt is absent from the group's mapping, never 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Group = Mapping[str, np.ndarray]  # reward name -> float [K]
EPS = 1e-4  # added to the std, so that near-ties do not become unit advantages


class Options(Protocol):
    """`signal.*` of the signal `advantages`."""

    @property
    def std(self) -> str: ...  # group | global | none

    @property
    def clamp(self) -> float: ...

    @property
    def combine(self) -> str: ...  # rewards | advantages | pareto


@dataclass(frozen=True, slots=True)
class AdvantageResult:
    """Per group, in the order given: advantages float32 [K], weighted rewards float32 [K], equal-reward flags."""

    advantages: list[np.ndarray]
    rewards: list[np.ndarray]
    zero_std: list[bool]
    metrics: dict[str, float]


def weighted_rewards(scores: Group, weights: Mapping[str, float]) -> np.ndarray:
    """sum_k weight_k * reward_k over the rewards that apply, each [..., K] -> float32 [..., K].

    A reward that is missing from `scores`, or NaN for a take, does not apply to it. Raises ValueError where none does.
    """
    terms = np.stack([weights[name] * np.asarray(scores[name], np.float64) for name in weights if name in scores])
    applies = ~np.isnan(terms)
    if not applies.any(axis=0).all():
        raise ValueError("a take has no reward that applies to it")
    return np.sum(np.where(applies, terms, 0.0), axis=0).astype(np.float32)


def is_zero_std(rewards: np.ndarray) -> np.ndarray:
    """[..., K] -> bool [...], True when the takes cannot be told apart: spread below float32 noise of the rewards'
    size."""
    return np.ptp(rewards, axis=-1) <= 1e-6 * np.maximum(1.0, np.abs(rewards).max(axis=-1))


def non_dominated(values: np.ndarray) -> np.ndarray:
    """The Pareto set of takes, bool [K], of `values` [R, K] (higher is better in each of R rewards).

    Take a dominates take b if it is at least as good in all rewards and better in one (Parrot, arXiv 2401.05675).
    """
    no_worse = (values[:, :, None] >= values[:, None, :]).all(axis=0)  # [a, b]
    better = (values[:, :, None] > values[:, None, :]).any(axis=0)
    return np.logical_not(np.any(no_worse & better, axis=0))


@dataclass(frozen=True, slots=True)
class _Block:
    """Groups with the same rewards and equally many takes, stacked: a step may have hundreds of groups, and with small
    arrays all the time goes into calling numpy."""

    positions: list[int]  # of the G groups in the step
    scores: dict[str, np.ndarray]  # per reward [G, K]
    prepared: dict[str, np.ndarray]  # what is combined instead of the scores, float64 [G, K]
    variances: dict[str, np.ndarray]  # of the rewards that were repeated, [G, K]


def _blocks(scores: Sequence[Group], prepared: Sequence[Group], variances: Sequence[Group]) -> list[_Block]:
    positions_of: dict[tuple, list[int]] = {}  # by rewards, takes and repeated rewards
    for i, (group, variance) in enumerate(zip(scores, variances, strict=True)):
        sizes = tuple((name, len(values)) for name, values in group.items())
        positions_of.setdefault((sizes, tuple(variance)), []).append(i)

    def stacked(groups: Sequence[Group], chosen: list[int], dtype: type | None = None) -> dict[str, np.ndarray]:
        names = groups[chosen[0]]
        return {name: np.stack([groups[i][name] for i in chosen]).astype(dtype, copy=False) for name in names}

    return [
        _Block(each, stacked(scores, each), stacked(prepared, each, np.float64), stacked(variances, each, np.float64))
        for each in positions_of.values()
    ]


def _in_order(blocks: Sequence[_Block], values: Iterable[np.ndarray]) -> list[np.ndarray]:
    """`values` per block, [G, ...], as one list in the groups' order."""
    row_of = {
        i: row for block, rows in zip(blocks, values, strict=True) for i, row in zip(block.positions, rows, strict=True)
    }
    return [row_of[i] for i in sorted(row_of)]


def _normalise(
    blocks: Sequence[_Block], rewards: Sequence[np.ndarray], cfg: Options, kinds: Sequence[Hashable]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(r - mean_group) / (std + EPS); std (population) of the group, or of all takes of the step in groups of the same
    kind: sums of different rewards have no common scale.

    Per block, whose `rewards` are float64 [G, K]: the advantages [G, K], and the std (+ EPS) of one unit of advantage
    in the units of the rewards [G].
    """
    step_std: dict[Hashable, float] = {}
    for kind in set(kinds) if cfg.std == "global" else ():
        chosen = [i for i, other in enumerate(kinds) if other == kind]
        of_kind = _in_order([blocks[i] for i in chosen], [rewards[i] for i in chosen])
        step_std[kind] = float(np.concatenate(of_kind).std())
    result = []
    for kind, values in zip(kinds, rewards, strict=True):
        centred = values - values.mean(axis=-1, keepdims=True)
        std = np.full(len(values), step_std[kind]) if cfg.std == "global" else values.std(axis=-1)
        scale = std + EPS
        if cfg.std != "none":
            centred = np.where(is_zero_std(values)[:, None], 0.0, centred / scale[:, None])
        result.append((centred, scale))
    return result


def _trust(variances: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """exp(-u), u = variance of a take's repeated scores in units of the spread within its group, squared (Ctrl-U,
    arXiv 2410.11236: exp(-u) lowers the weight of uncertain rewards). [G, K]; `scale` [G]."""
    return np.exp(-variances / scale[:, None] ** 2)


def compute_advantages(
    scores: Sequence[Group],
    weights: Mapping[str, float],
    cfg: Options,
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
    if any(all(name not in group for name in weights) for group in scores):
        raise ValueError("no reward applies to a group")
    blocks = _blocks(scores, scores if prepared is None else prepared, variances or [{}] * len(scores))
    for block in blocks:
        for name, values in block.scores.items():
            if not np.isfinite(values).all():
                raise ValueError(f"reward {name} is not finite; a failed score must fail its group, not be averaged")
    rewards = [weighted_rewards(block.scores, weights) for block in blocks]
    combined = _sum_rewards if cfg.combine == "rewards" else _sum_advantages
    raw, zero, combining = combined(blocks, weights, cfg)
    advantages = [block.astype(np.float32) for block in raw]
    zero_std = [bool(flag) for flag in _in_order(blocks, zero)]
    metrics = {
        "reward/mean": float(np.concatenate(_in_order(blocks, rewards)).mean()),
        "reward/std": float(np.mean(_in_order(blocks, [block.std(axis=-1) for block in rewards]))),
        "zero_std_ratio": float(np.mean(zero_std)),
        "advantage/mean_abs": float(np.mean(_in_order(blocks, [np.abs(block).mean(axis=-1) for block in advantages]))),
    }
    for name in weights:
        values_of = [group[name] for group in scores if name in group]
        if values_of:
            metrics[f"reward/{name}"] = float(np.concatenate(values_of).mean())
        if len(values_of) < len(scores):
            metrics[f"combine/applies/{name}"] = len(values_of) / len(scores)
    ordered = _in_order(blocks, advantages), _in_order(blocks, rewards)
    return AdvantageResult(*ordered, zero_std, metrics | combining)


Combined = tuple[list[np.ndarray], list[np.ndarray], dict[str, float]]  # per block [G, K], bool [G]; metrics


def _sum_rewards(blocks: Sequence[_Block], weights: Mapping[str, float], cfg: Options) -> Combined:
    """The advantages of the weighted sum of rewards."""
    totals = [weighted_rewards(block.prepared, weights) for block in blocks]
    kinds = [tuple(name for name in weights if name in block.scores) for block in blocks]
    raw, trusts, trusted = [], [], []
    normalised = _normalise(blocks, [total.astype(np.float64) for total in totals], cfg, kinds)
    for block, (advantages, scale) in zip(blocks, normalised, strict=True):
        terms = [weights[name] ** 2 * block.variances[name] for name in weights if name in block.variances]
        if terms:
            trusts.append(_trust(np.sum(terms, axis=0), scale))
            trusted.append(block)
            advantages = advantages * trusts[-1]
        raw.append(np.clip(advantages, -cfg.clamp, cfg.clamp))
    parts = [
        {name: weights[name] * block.prepared[name] for name in weights if name in block.prepared} for block in blocks
    ]
    metrics = _shares(blocks, parts)
    if trusts:
        metrics["combine/trust"] = float(np.concatenate(_in_order(trusted, trusts)).mean())
    return raw, [is_zero_std(total) for total in totals], metrics


def _sum_advantages(blocks: Sequence[_Block], weights: Mapping[str, float], cfg: Options) -> Combined:
    """The weighted sum of each reward's own advantages; `pareto`: kept for the non-dominated takes of a group."""
    parts: list[dict[str, np.ndarray]] = [{} for _ in blocks]
    metrics: dict[str, float] = {}
    for name in weights:
        indices = [i for i, block in enumerate(blocks) if name in block.prepared]
        scored = [blocks[i] for i in indices]
        normalised = _normalise(scored, [block.prepared[name] for block in scored], cfg, [name] * len(scored))
        trusts, trusted = [], []
        for i, (advantages, scale) in zip(indices, normalised, strict=True):
            if name in blocks[i].variances:
                trusts.append(_trust(blocks[i].variances[name], scale))
                trusted.append(blocks[i])
                advantages = advantages * trusts[-1]
            parts[i][name] = weights[name] * advantages
        if trusts:
            metrics[f"combine/trust/{name}"] = float(np.concatenate(_in_order(trusted, trusts)).mean())
    raw = [np.clip(np.sum(list(part.values()), axis=0), -cfg.clamp, cfg.clamp) for part in parts]
    # Not of the sum: rewards of unequal weight may add up to a constant and still have advantages.
    zero = []
    for block, part in zip(blocks, parts, strict=True):
        equal = [is_zero_std(block.prepared[name]) for name in part if weights[name]]
        zero.append(np.all(equal or [np.ones(len(block.positions), bool)], axis=0))
    if cfg.combine == "pareto":
        chosen = [np.stack([_pareto(block, g, weights) for g in range(len(block.positions))]) for block in blocks]
        # The learner averages over K takes, Parrot over the n(P) that are kept.
        raw = [
            group * keep * (keep.shape[1] / keep.sum(axis=1, keepdims=True))
            for group, keep in zip(raw, chosen, strict=True)
        ]
        metrics["combine/non_dominated"] = float(np.concatenate(_in_order(blocks, chosen)).mean())
    return raw, zero, metrics | _shares(blocks, parts)


def _pareto(block: _Block, group: int, weights: Mapping[str, float]) -> np.ndarray:
    """Which takes of the block's group are kept, bool [K]. A reward of negative weight is better where it is lower; one
    of weight 0 does not count."""
    prepared = block.prepared
    named = [np.sign(weights[name]) * prepared[name][group] for name in weights if name in prepared and weights[name]]
    return non_dominated(np.stack(named)) if named else np.ones(next(iter(prepared.values())).shape[1], bool)


def _shares(blocks: Sequence[_Block], parts: Sequence[Group]) -> dict[str, float]:
    """Each reward's share of the spread within groups, averaged over the groups that have it: how much it decides."""
    shares_of: dict[str, dict[int, float]] = {}
    for block, part in zip(blocks, parts, strict=True):
        spread = {name: np.std(values, axis=-1) for name, values in part.items()}  # [G]
        total = sum(spread.values())
        for name, values in spread.items() if len(spread) > 1 else ():
            rows = zip(block.positions, values, total, strict=True)
            shares_of.setdefault(name, {}).update({i: value / whole for i, value, whole in rows if whole > 0})
    return {
        f"combine/share/{name}": float(np.mean([shares[i] for i in sorted(shares)]))
        for name, shares in shares_of.items()
        if shares
    }
