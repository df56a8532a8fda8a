"""DDIM with eta: the stochastic sampler of DDPO."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.rl.samplers.base import DIFFUSION, NoiseLevels, Sampler, Transition, clean_and_noise, register

if TYPE_CHECKING:
    import torch


@register("ddim")
class DDIM(Sampler):
    """DDIM with eta, for models that predict epsilon, v or the sample; `noise_level` is eta."""

    predictions = DIFFUSION
    preference = 4

    def step(
        self, x: torch.Tensor, out: torch.Tensor, levels: NoiseLevels, prediction: str, noise_level: float
    ) -> Transition:
        return ddim_step(x, out, levels.sigma, levels.sigma_next, noise_level, prediction, levels.cap)


def ddim_step(
    x: torch.Tensor, out: torch.Tensor, abar: float, abar_next: float, eta: float, prediction: str, clip: float = 0.0
) -> Transition:
    """DDIM with eta (DDPO's policy, arXiv 2305.13301; Song et al. 2021 eq. 12). `clip` > 0: x0 is clamped to +- clip.

    std = eta sqrt((1 - abar') / (1 - abar) (1 - abar / abar')),  mean = sqrt(abar') x0 + sqrt(1 - abar' - std^2) eps
    """
    x0, eps = clean_and_noise(x, out, abar, prediction)
    if clip > 0.0:
        x0 = x0.clamp(-clip, clip)
    std = eta * math.sqrt(max((1.0 - abar_next) / (1.0 - abar) * (1.0 - abar / abar_next), 0.0))
    mean = math.sqrt(abar_next) * x0 + math.sqrt(max(1.0 - abar_next - std * std, 0.0)) * eps
    return Transition(mean, std, abar_next - abar)
