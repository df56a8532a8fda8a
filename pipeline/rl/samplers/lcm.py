"""Multistep consistency sampling: the policy of RLCM."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.rl.samplers.base import DIFFUSION, NoiseLevels, Sampler, Transition, clean_and_noise, register

if TYPE_CHECKING:
    import torch


@register("lcm")
class LCM(Sampler):
    """Multistep consistency sampling, for latent consistency models; the noise is the model's, not `noise_level`'s."""

    predictions = DIFFUSION
    schedulers = ("LCMScheduler",)
    preference = 5

    def step(
        self, x: torch.Tensor, out: torch.Tensor, levels: NoiseLevels, prediction: str, noise_level: float
    ) -> Transition:
        return lcm_step(x, out, levels.sigma, levels.sigma_next, levels.cap, prediction)


def consistency_function(
    x: torch.Tensor, out: torch.Tensor, abar: float, scaled_t: float, prediction: str
) -> torch.Tensor:
    """f(x_t) = c_skip x_t + c_out x0 of a latent consistency model (arXiv 2310.04378, sigma_data 0.5)."""
    x0, _ = clean_and_noise(x, out, abar, prediction)
    c_skip = 0.25 / (scaled_t**2 + 0.25)
    c_out = scaled_t / math.sqrt(scaled_t**2 + 0.25)
    return c_out * x0 + c_skip * x


def lcm_step(
    x: torch.Tensor, out: torch.Tensor, abar: float, abar_next: float, scaled_t: float, prediction: str
) -> Transition:
    """Multistep consistency sampling as a policy (RLCM, arXiv 2404.03673): N(sqrt(abar') f(x_t), (1 - abar') I).

    The model fixes the noise, so `noise_level` is not used.
    """
    denoised = consistency_function(x, out, abar, scaled_t, prediction)
    return Transition(math.sqrt(abar_next) * denoised, math.sqrt(1.0 - abar_next), abs(abar_next - abar))
