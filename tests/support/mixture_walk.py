"""A chain whose samples are exactly those of a Gaussian mixture, as a `Walk`: searches run on it as on a pipeline.

x_t = a_t x0 + b_t eps with x0 ~ sum_k w_k N(m_k, S^2); a step draws from the exact p(x_{t-1} | x_t), so nothing but the
search itself can move the samples. Under p(x0) exp(c x0) the weights become w_k exp(c m_k + c^2 S^2 / 2) and the means
m_k + c S^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.special import ndtri

from pipeline.search.base import Particle, Search, Task
from pipeline.search.run import run_searches

W, M, S = np.array([0.7, 0.3]), np.array([-1.0, 1.0]), 0.4
SIGNAL = np.array([0.05, 0.4, 0.65, 0.85, 0.96])  # a_t at levels 0..4; finished: 1
STEPS = len(SIGNAL)


def tilted(slope: float) -> tuple[float, float]:
    """(mean of x0, share of the upper mode)"""
    shares = W * np.exp(slope * M)
    shares /= shares.sum()
    return float(shares @ (M + slope * S**2)), float(shares[1])


def _uniform(seeds: np.ndarray, step: int, use: int) -> np.ndarray:
    """In (0, 1), a function of (seed, step, use) alone: splitmix64."""
    with np.errstate(over="ignore"):
        z = seeds.astype(np.uint64) * np.uint64(3) + np.uint64(1_000_003 * (2 * step + use) + 1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z + np.uint64(0x9E3779B97F4A7C15)) ^ (z >> np.uint64(shift))
            z = z * np.uint64(factor)
        z = z ^ (z >> np.uint64(31))
    return (z.astype(np.float64) + 0.5) / 2.0**64


class MixtureWalk:
    """The reward is x0 times `slope`; looking ahead gives that of E[x0 | x_t]."""

    def __init__(self, slope: float = 1.0) -> None:
        self.slope, self.rows = slope, 0

    def advance(self, particles: Sequence[Particle], owners: Sequence[int], to: int) -> list[Particle]:
        level = particles[0].level
        self.rows += len(particles) * (min(to, STEPS - 1) - level)
        x = None if level < 0 else np.array([particle.x for particle in particles])
        for step in range(level, to):
            seeds = [max(e for e in p.lineage if e[0] <= max(step, 0))[1] for p in particles]
            x = self._step(x, step, np.array(seeds, np.int64))
        return [replace(particle, level=to, x=value) for particle, value in zip(particles, x, strict=True)]

    def _step(self, x: np.ndarray | None, step: int, seeds: np.ndarray) -> np.ndarray:
        pick, noise = _uniform(seeds, step + 1, 0), ndtri(_uniform(seeds, step + 1, 1))
        if step < 0:  # x at level 0, from the mixture noised to it
            k = (pick > W[0]).astype(int)
            return SIGNAL[0] * M[k] + np.sqrt(SIGNAL[0] ** 2 * S**2 + 1 - SIGNAL[0] ** 2) * noise
        a, a_next = SIGNAL[step], 1.0 if step == STEPS - 1 else SIGNAL[step + 1]
        k = (pick > _posterior(x, a)[:, 0]).astype(int)
        # x_t = r x' + sqrt(1 - r^2) eps with r = a / a', and x' ~ N(a' m_k, a'^2 S^2 + 1 - a'^2)
        r, prior = a / a_next, a_next**2 * S**2 + 1 - a_next**2
        gain = r * prior / (r**2 * prior + 1 - r**2)
        mean = a_next * M[k] + gain * (x - a * M[k])
        return mean + np.sqrt(prior * (1 - gain * r)) * noise

    def score(self, particles: Sequence[Particle], owners: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        x = np.array([particle.x for particle in particles])
        level = particles[0].level
        if level < STEPS:
            a = SIGNAL[level]
            variance = a**2 * S**2 + 1 - a**2
            means = M + a * S**2 / variance * (x[:, None] - a * M)
            x = (_posterior(x, a) * means).sum(1)
        return self.slope * x, [np.zeros((1, 1, 1, 3), np.uint8)] * len(x)


def _posterior(x: np.ndarray, a: float) -> np.ndarray:
    """p(component | x_t) [n, 2]"""
    logs = np.log(W) - (x[:, None] - a * M) ** 2 / (2 * (a**2 * S**2 + 1 - a**2))
    shares = np.exp(logs - logs.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def found(search: Search, count: int, slope: float = 1.0, first: int = 0) -> np.ndarray:
    """x0 of the takes that independent searches find [count]."""
    tasks = [Task(steps=STEPS, noisy=tuple(range(STEPS)), seed=10_000 + first + i) for i in range(count)]
    return np.array([f.best.x for f in run_searches(search, tasks, MixtureWalk(slope))])
