"""Dance-SDE: the stochastic sampler of DanceGRPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.rl.samplers.base import FLOW, NoiseLevels, Sampler, Transition, flow_step, register

if TYPE_CHECKING:
    import torch


@register("dance_sde")
class DanceSDE(Sampler):
    """Marginal-preserving SDE with constant noise (DanceGRPO, arXiv 2505.07818); `noise_level` is g = eta."""

    predictions = FLOW
    default_noise = 0.3
    preference = 2

    def step(
        self, x: torch.Tensor, out: torch.Tensor, levels: NoiseLevels, prediction: str, noise_level: float
    ) -> Transition:
        return flow_step(x, out, levels.sigma, levels.sigma_next, noise_level)
