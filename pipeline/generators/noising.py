"""Clean samples x0, noise eps, noised samples x_t and model outputs: how each follows from the others at a noise level.

Flow: x_t = (1 - sigma) x0 + sigma eps, output eps - x0. Diffusion: x_t = sqrt(a) x0 + sqrt(1 - a) eps with
a = alphas_cumprod, output eps, x0, or v = sqrt(a) eps - sqrt(1 - a) x0 (arXiv 2202.00512).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.rl.samplers import Transition
from pipeline.rl.samplers.base import NoiseLevels, clean_and_noise
from pipeline.rl.samplers.lcm import consistency_function, lcm_step


def noised(prediction: str, level: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """x_t, float32 like x0 [b, ...]. `level`: float64, broadcast to x0; flow: sigma, else alphas_cumprod."""
    signal, noise = _amplitudes(prediction, level)
    return signal.float() * x0.float() + noise.float() * eps


def target(prediction: str, level: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The output of a perfect model for `noised(prediction, level, x0, eps)`, float32. Raises ValueError."""
    if prediction == "flow":
        return eps - x0.float()
    if prediction == "epsilon":
        return eps
    if prediction == "sample":
        return x0.float()
    if prediction == "v_prediction":
        signal, noise = _amplitudes(prediction, level)
        return signal.float() * eps - noise.float() * x0.float()
    raise ValueError(f"unknown prediction type {prediction!r}; known: flow, epsilon, v_prediction, sample")


def clean_error_scale(prediction: str, level: torch.Tensor) -> torch.Tensor:
    """By what an error of the model's output is multiplied to be the error of the x0 that it stands for, float32 like
    `level`, up to its sign."""
    if prediction == "sample":
        return torch.ones_like(level).float()
    signal, noise = _amplitudes(prediction, level)
    return (noise / signal if prediction == "epsilon" else noise).float()


def clean_prediction(
    prediction: str, levels: NoiseLevels, x: torch.Tensor, out: torch.Tensor, consistency: bool = False
) -> torch.Tensor:
    """x0 as a model's output `out` for the sample `x` predicts it, float32 [b, ...]. `consistency`: of an LCM."""
    x, out = x.float(), out.float()
    if prediction == "flow":
        return x - levels.sigma * out
    if consistency:
        return consistency_function(x, out, levels.sigma, levels.cap, prediction)
    if levels.sigma == 0.0 and prediction == "epsilon":
        return torch.zeros_like(x)
    return clean_and_noise(x, out, levels.sigma, prediction)[0]


def consistency_transition(
    prediction: str, levels: NoiseLevels, x: torch.Tensor, out: torch.Tensor, last: bool
) -> Transition:
    """An LCM's step, whose noise is the sampler's own; the `last` one gives its x0 prediction and draws none."""
    step = lcm_step(x.float(), out.float(), levels.sigma, levels.sigma_next, levels.cap, prediction)
    if not last:
        return step
    return replace(step, mean=clean_prediction(prediction, levels, x, out, consistency=True), std=0.0)


def _amplitudes(prediction: str, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(of x0, of eps) in x_t, float64."""
    return (1.0 - level, level) if prediction == "flow" else (level.sqrt(), (1.0 - level).sqrt())
