"""Means of scores with their standard error, for evaluations during training, `rushes evaluate`, reports and trackers.

Prompts are the independent units: takes of one prompt share its difficulty, so they are averaged first and the error
is computed over the prompts' means.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Direction = Literal["up", "down", "same", "unknown"]
"""Of a difference: beyond its error, within it (no change can be measured), or without an error (a single prompt)."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts. `se`: its standard error; `ci95`: half width of its 95 % confidence interval; both None for
    a single prompt."""

    mean: float
    se: float | None
    ci95: float | None
    n: int  # prompts

    def direction(self, level: float = 0.95) -> Direction:
        """Of a difference: whether its confidence interval leaves 0 out, and on which side it lies."""
        if self.se is None:
            return "unknown"
        if abs(self.mean) <= t_quantile(self.n - 1, level) * self.se:
            return "same"
        return "up" if self.mean > 0 else "down"


@functools.lru_cache(maxsize=1024)
def t_quantile(degrees_of_freedom: int, level: float = 0.95) -> float:
    """Quantile of Student's t distribution that a two-sided interval of this level ends at."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, degrees_of_freedom))


def prompt_means(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """`values` [N] of takes and their prompts' indices [N] -> float64 [P], the mean of each prompt, by index; NaN for
    a prompt with nothing but NaN."""
    values = np.asarray(values, np.float64)
    of_prompts = [values[(prompts == prompt) & ~np.isnan(values)] for prompt in np.unique(prompts)]
    return np.array([chosen.mean() if len(chosen) else np.nan for chosen in of_prompts])


def estimate(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """The mean of `values` [N] of takes of the prompts with indices `prompts` [N]."""
    return estimate_of_means(prompt_means(values, prompts))


def estimate_of_means(means: np.ndarray) -> Estimate:
    """The mean of independent values [P], such as `prompt_means`."""
    n = len(means)
    if n < 2:
        return Estimate(mean=float(means.mean()), se=None, ci95=None, n=n)
    se = float(means.std(ddof=1) / math.sqrt(n))
    return Estimate(mean=float(means.mean()), se=se, ci95=t_quantile(n - 1) * se, n=n)


def unpaired_difference(first: Estimate, last: Estimate) -> Estimate:
    """last - first of two independent means that both have an error (Welch 1947); `n` - 1: its degrees of freedom,
    rounded down."""
    assert first.se is not None and last.se is not None
    one, two = first.se**2, last.se**2
    freedom = (one + two) ** 2 / (one**2 / (first.n - 1) + two**2 / (last.n - 1)) if one + two else 1
    se, n = math.sqrt(one + two), max(1, int(freedom + 1e-9)) + 1
    return Estimate(mean=last.mean - first.mean, se=se, ci95=t_quantile(n - 1) * se, n=n)


def wins(difference: np.ndarray) -> np.ndarray:
    """float64 [N]: 1 where the difference is positive, 0 where negative, and half for a tie."""
    return (1.0 + np.sign(difference)) / 2


def win_rate(values: np.ndarray, others: np.ndarray, prompts: np.ndarray) -> Estimate:
    """How often `values` [N] beat `others` [N], takes of the same prompts and seeds; a tie counts half."""
    return estimate(wins(np.asarray(values) - np.asarray(others)), prompts)


def with_error(mean: float, se: float | None, digits: int = 4, sign: str = "") -> str:
    """'0.8310 ± 0.0123'; without an error, where there is none, '0.8310'. `sign`: '+' shows it for positive means."""
    error = "" if se is None else f" ± {se:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{error}"
