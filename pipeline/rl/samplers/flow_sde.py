"""Flow-SDE: the stochastic sampler of Flow-GRPO."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.rl.samplers.base import FLOW, NoiseLevels, Sampler, Transition, flow_step, register

if TYPE_CHECKING:
    import torch


@register("flow_sde")
class FlowSDE(Sampler):
    """Marginal-preserving SDE with noise g_t = a sqrt(t / (1 - t)) (Flow-GRPO); `noise_level` is a."""

    predictions = FLOW
    default_noise = 0.7
    preference = 1

    def step(
        self, x: torch.Tensor, out: torch.Tensor, levels: NoiseLevels, prediction: str, noise_level: float
    ) -> Transition:
        noise = flow_sde_noise(noise_level, levels.sigma, levels.cap)
        return flow_step(x, out, levels.sigma, levels.sigma_next, noise)


def flow_sde_noise(level: float, sigma: float, sigma_cap: float) -> float:
    """g_t = a sqrt(t / (1 - t)) (Flow-GRPO, arXiv 2505.05470); at t = 1 only the denominator uses `sigma_cap`."""
    return level * math.sqrt(sigma / (1.0 - (sigma_cap if sigma >= 1.0 else sigma)))
