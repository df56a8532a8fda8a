"""The deterministic sampler: Euler for flow models, DDIM with eta 0 for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.rl.samplers.base import DIFFUSION, FLOW, NoiseLevels, Sampler, Transition, flow_step, register
from pipeline.rl.samplers.ddim import ddim_step

if TYPE_CHECKING:
    import torch


@register("ode")
class ODE(Sampler):
    """No noise: steps that are not trained, evaluation, generation."""

    predictions = (*FLOW, *DIFFUSION)
    draws_noise = False

    def step(
        self, x: torch.Tensor, out: torch.Tensor, levels: NoiseLevels, prediction: str, noise_level: float
    ) -> Transition:
        if prediction in FLOW:
            return flow_step(x, out, levels.sigma, levels.sigma_next, 0.0)
        return ddim_step(x, out, levels.sigma, levels.sigma_next, 0.0, prediction, levels.cap)
