"""How well differences of scores agree with people's judgements of pairs: accuracy, ties, calibration.

Pairs of one prompt are not independent, so all intervals take prompts as the units. What has to be fitted (the tie
threshold, the scale of the differences) is fitted on other prompts than it is tested on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.core.statistics import t_quantile, wins

FOLDS = 5
BINS = 5  # of confidence, from 0.5 to 1


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """A share with its 95 % interval (None for a single prompt)."""

    mean: float
    low: float | None
    high: float | None
    n: int  # pairs
    prompts: int


def clustered_variance(values: np.ndarray, prompts: np.ndarray) -> float:
    """Variance of the mean of `values` [N] whose errors are independent between prompts only."""
    _, index = np.unique(prompts, return_inverse=True)
    sums = np.bincount(index, weights=values - values.mean())
    groups = len(sums)
    return float(groups / (groups - 1) * (sums**2).sum() / len(values) ** 2)


def proportion(values: np.ndarray, prompts: np.ndarray) -> Proportion:
    """Of `values` [N] in 0..1: Wilson's interval at the number of independent pairs that the prompts are worth.

    That number is N over the design effect (clustered / binomial variance, at least 1); where all values are equal
    there is nothing to estimate it from, and it is the number of prompts.
    """
    values = np.asarray(values, np.float64)
    n, mean, groups = len(values), float(values.mean()), len(np.unique(prompts))
    if groups < 2:
        return Proportion(mean=mean, low=None, high=None, n=n, prompts=groups)
    binomial = mean * (1 - mean) / n
    size = n / max(1.0, clustered_variance(values, prompts) / binomial) if binomial > 0 else float(groups)
    z2 = t_quantile(groups - 1) ** 2 / size
    centre = (mean + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * (mean * (1 - mean) + z2 / 4)) / (1 + z2)
    return Proportion(
        mean=mean, low=float(max(0.0, centre - half)), high=float(min(1.0, centre + half)), n=n, prompts=groups
    )


def hits(difference: np.ndarray, label: np.ndarray) -> np.ndarray:
    """1 where score(a) - score(b) has the sign of `label` (+1: a is better, -1: b), half for equal scores."""
    return wins(difference * label)


def hits_with_ties(difference: np.ndarray, label: np.ndarray, threshold: float) -> np.ndarray:
    """Three answers: a tie (label 0) where |difference| <= threshold, else the sign. Threshold below 0: never a tie."""
    answer = np.where(np.abs(difference) <= threshold, 0, np.sign(difference))
    return (answer == label).astype(np.float64)


def fit_threshold(difference: np.ndarray, label: np.ndarray) -> float:
    """The threshold of the most three-way hits (tie calibration, arXiv 2305.14324); the smallest of equal ones."""
    size = np.abs(difference)
    order = np.argsort(size, kind="stable")
    tied = np.concatenate([[0], np.cumsum(label[order] == 0)])  # hits among the first i, called ties
    right = (np.sign(difference) == label)[order] & (label[order] != 0)
    beyond = np.concatenate([np.cumsum(right[::-1])[::-1], [0]])  # hits among the others
    last = np.append(np.diff(size[order]) > 0, True)  # a cut between equal differences is no threshold
    allowed = np.concatenate([[True], last])
    best = int(np.argmax(np.where(allowed, tied + beyond, -1)))
    return -1.0 if best == 0 else float(size[order][best - 1])


def folds_of(prompts: np.ndarray) -> np.ndarray:
    """Fold of each pair; all pairs of a prompt are in one. Same prompts, same folds."""
    unique, index = np.unique(prompts, return_inverse=True)
    return np.random.default_rng(0).permutation(len(unique))[index] % min(FOLDS, len(unique))


def accuracy_with_ties(difference: np.ndarray, label: np.ndarray, prompts: np.ndarray) -> tuple[Proportion, float]:
    """Three-way accuracy at thresholds fitted on the other folds, and the threshold of all pairs."""
    folds = folds_of(prompts)
    correct = np.zeros(len(label))
    for fold in np.unique(folds):
        test = folds == fold
        train = ~test if (~test).any() else test
        correct[test] = hits_with_ties(difference[test], label[test], fit_threshold(difference[train], label[train]))
    return proportion(correct, prompts), fit_threshold(difference, label)


# ------------------------------------------------------------------------------------------------ calibration


def fit_slope(difference: np.ndarray, label: np.ndarray) -> float:
    """s of P(a is better) = 1 / (1 + exp(-s difference)) (Bradley-Terry), by Newton's method.

    A weak prior (as if one more pair of average difference had been judged each way) keeps s finite where the reward
    orders every pair as people do.
    """
    unit = float(np.sqrt(np.mean(difference**2)))
    if unit == 0:
        return 0.0
    x = np.concatenate([difference / unit, [1.0, 1.0]])
    y = np.concatenate([(label > 0).astype(np.float64), [1.0, 0.0]])
    slope = 0.0
    for _ in range(100):
        p = _sigmoid(slope * x)
        step = float((x * (y - p)).sum() / max((x**2 * p * (1 - p)).sum(), 1e-12))
        slope += float(np.clip(step, -2.0, 2.0))
        if abs(step) < 1e-10:
            break
    return slope / unit


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`slope`: log-odds per unit of score. `log_loss`: per pair, in nats; ln 2 = 0.693 is knowing nothing. `error`:
    mean |confidence - accuracy| over bins of confidence. `bins`: rows of confidence, accuracy, n."""

    slope: float
    log_loss: float
    error: float
    bins: list[dict[str, float]]


def calibration(difference: np.ndarray, label: np.ndarray, prompts: np.ndarray) -> Calibration:
    """Of decided pairs (label +-1); probabilities come from slopes fitted on the other folds."""
    folds = folds_of(prompts)
    chance = np.zeros(len(label))
    for fold in np.unique(folds):
        test = folds == fold
        train = ~test if (~test).any() else test
        chance[test] = _sigmoid(fit_slope(difference[train], label[train]) * difference[test])
    log_loss, error, bins = reliability(chance, label)
    return Calibration(slope=fit_slope(difference, label), log_loss=log_loss, error=error, bins=bins)


def reliability(chance: np.ndarray, label: np.ndarray) -> tuple[float, float, list[dict[str, float]]]:
    """Of probabilities `chance` [N] that a is better, and decided pairs (label +-1): what `Calibration` holds as
    log_loss, error and bins."""
    right = np.clip(np.where(label > 0, chance, 1 - chance), 1e-12, 1.0)
    confidence = np.maximum(chance, 1 - chance)
    hit = np.where(chance == 0.5, 0.5, ((chance > 0.5) == (label > 0)).astype(np.float64))
    place = np.minimum((2 * BINS * (confidence - 0.5)).astype(int), BINS - 1)
    bins = [
        {"confidence": float(confidence[place == b].mean()), "accuracy": float(hit[place == b].mean()), "n": int(n)}
        for b, n in enumerate(np.bincount(place, minlength=BINS))
        if n
    ]
    error = sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / len(label)
    return float(-np.log(right).mean()), float(error), bins
