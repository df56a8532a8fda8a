"""Means with confidence intervals, and paired comparisons of two sets of takes on the same prompts and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its standard error and the half width of its 95 % confidence interval (None for one prompt)."""

    mean: float
    se: float | None
    half: float | None
    n: int  # independent units: prompts


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def per_prompt(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Means over each prompt's takes: takes of one prompt are not independent."""
    return np.array([values[prompts == prompt].mean() for prompt in np.unique(prompts)])


def estimate(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Of `values` [N] with prompt index [N]; prompts are the independent units."""
    means = per_prompt(np.asarray(values, np.float64), prompts)
    n = len(means)
    if n < 2:
        return Estimate(mean=float(means.mean()), se=None, half=None, n=n)
    se = float(means.std(ddof=1) / np.sqrt(n))
    return Estimate(mean=float(means.mean()), se=se, half=t_quantile(n - 1) * se, n=n)


def win_rate(a: np.ndarray, b: np.ndarray, prompts: np.ndarray) -> Estimate:
    """How often `a` beats `b` on the same prompt and seed; a tie counts half."""
    return estimate(np.where(a > b, 1.0, np.where(a == b, 0.5, 0.0)), prompts)
