"""CPS: coefficients-preserving sampling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.rl.samplers.base import FLOW, NoiseLevels, Sampler, Transition, register

if TYPE_CHECKING:
    import torch


@register("cps")
class CPS(Sampler):
    """Coefficients-preserving sampling: the total noise weight stays t_next; `noise_level` is eta.

    Its log-prob is the published one, -|x' - mean|^2. In the full density, 1 / (2 std^2) with std = t' sin(eta pi / 2),
    the last noisy steps would make nearly all of the gradient.
    """

    predictions = FLOW
    default_noise = 0.7
    preference = 3

    def step(
        self, x: torch.Tensor, out: torch.Tensor, levels: NoiseLevels, prediction: str, noise_level: float
    ) -> Transition:
        return cps_step(x, out, levels.sigma, levels.sigma_next, noise_level)


def cps_step(x: torch.Tensor, v: torch.Tensor, t: float, t_next: float, eta: float) -> Transition:
    """Coefficients-preserving sampling (arXiv 2509.05952): total noise weight stays t_next; log-prob of sharpness 1.

    mean = (1 - t') x0 + t' cos(eta pi / 2) eps,  std = t' sin(eta pi / 2)
    """
    angle = eta * math.pi / 2.0
    x0, eps = x - t * v, x + (1.0 - t) * v
    mean = (1.0 - t_next) * x0 + (t_next * math.cos(angle)) * eps
    return Transition(mean, t_next * math.sin(angle), t - t_next, sharpness=1.0)
