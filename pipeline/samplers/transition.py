"""One stochastic step x_t -> x_next of a flow or diffusion model: its Gaussian, and the log-prob of x_next.

Rollout and learner call the same functions on the same float32 tensors, which is what makes the replayed ratio 1.

Flow conventions: t = sigma in [0, 1], x_t = (1 - t) x0 + t eps, velocity v = eps - x0, dt = t' - t < 0.
Every coefficient is computed in Python floats (float64) and applied to float32 tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FLOW_KINDS = ("flow_sde", "dance_sde", "cps")
DIFFUSION_KINDS = ("ddim",)


@dataclass(frozen=True, slots=True)
class Transition:
    """N(mean, std^2 I). `mean` float32 [B, ...]; `std` 0 for a deterministic step; `dt` the step's |t' - t|."""

    mean: torch.Tensor
    std: float
    dt: float


def transition(
    kind: str,
    noise_level: float,
    prediction: str,
    sample: torch.Tensor,
    model_output: torch.Tensor,
    sigma: float,
    sigma_next: float,
    sigma_cap: float,
) -> Transition:
    """The Gaussian of the next sample.

    `kind`: flow_sde | dance_sde | cps | ddim | ode. `prediction`: flow | epsilon | v_prediction | sample.
    `sample`, `model_output`: [B, ...]. `sigma`, `sigma_next`: flow times, or alphas_cumprod for diffusion models.
    `sigma_cap`: flow-SDE's substitute for sigma = 1 in 1 / (1 - sigma). Raises ValueError for a kind that does not
    fit the prediction type.
    """
    x, out = sample.float(), model_output.float()
    if prediction == "flow":
        if kind == "ode":
            return flow_step(x, out, sigma, sigma_next, 0.0)
        if kind == "flow_sde":
            return flow_step(x, out, sigma, sigma_next, flow_sde_noise(noise_level, sigma, sigma_cap))
        if kind == "dance_sde":
            return flow_step(x, out, sigma, sigma_next, noise_level)
        if kind == "cps":
            return cps_step(x, out, sigma, sigma_next, noise_level)
        raise ValueError(
            f"sampler.kind: {kind} needs an epsilon, v or sample prediction model; this one predicts a flow"
        )
    if kind in ("ode", "ddim"):
        return ddim_step(x, out, sigma, sigma_next, 0.0 if kind == "ode" else noise_level, prediction)
    raise ValueError(f"sampler.kind: {kind} needs a flow model; this one predicts {prediction}: use ddim")


def flow_sde_noise(level: float, sigma: float, sigma_cap: float) -> float:
    """g_t = a sqrt(t / (1 - t)) (Flow-GRPO, arXiv 2505.05470); at t = 1 only the denominator uses `sigma_cap`."""
    return level * math.sqrt(sigma / (1.0 - (sigma_cap if sigma >= 1.0 else sigma)))


def flow_step(x: torch.Tensor, v: torch.Tensor, t: float, t_next: float, g: float) -> Transition:
    """Marginal-preserving reverse SDE with noise g_t (Flow-GRPO eq. 9; DanceGRPO is g constant; g = 0 is Euler).

    mean = x (1 + g^2 dt / 2t) + v (1 + g^2 (1 - t) / 2t) dt,  std = g sqrt(-dt)
    """
    dt = t_next - t
    if g == 0.0:
        return Transition(x + v * dt, 0.0, -dt)
    half = g * g / (2.0 * t)
    mean = x * (1.0 + half * dt) + v * ((1.0 + half * (1.0 - t)) * dt)
    return Transition(mean, g * math.sqrt(-dt), -dt)


def cps_step(x: torch.Tensor, v: torch.Tensor, t: float, t_next: float, eta: float) -> Transition:
    """Coefficients-preserving sampling (arXiv 2509.05952): total noise weight stays t_next.

    mean = (1 - t') x0 + t' cos(eta pi / 2) eps,  std = t' sin(eta pi / 2)
    """
    angle = eta * math.pi / 2.0
    x0, eps = x - t * v, x + (1.0 - t) * v
    return Transition((1.0 - t_next) * x0 + (t_next * math.cos(angle)) * eps, t_next * math.sin(angle), t - t_next)


def ddim_step(
    x: torch.Tensor, out: torch.Tensor, abar: float, abar_next: float, eta: float, prediction: str
) -> Transition:
    """DDIM with eta (DDPO's policy, arXiv 2305.13301; Song et al. 2021 eq. 12).

    std = eta sqrt((1 - abar') / (1 - abar) (1 - abar / abar')),  mean = sqrt(abar') x0 + sqrt(1 - abar' - std^2) eps
    """
    a, b = math.sqrt(abar), math.sqrt(1.0 - abar)
    if prediction == "epsilon":
        x0, eps = (x - b * out) / a, out
    elif prediction == "v_prediction":
        x0, eps = a * x - b * out, a * out + b * x
    elif prediction == "sample":
        x0, eps = out, (x - a * out) / b
    else:
        raise ValueError(f"unknown prediction type {prediction!r}; known: flow, epsilon, v_prediction, sample")
    std = eta * math.sqrt(max((1.0 - abar_next) / (1.0 - abar) * (1.0 - abar / abar_next), 0.0))
    mean = math.sqrt(abar_next) * x0 + math.sqrt(max(1.0 - abar_next - std * std, 0.0)) * eps
    return Transition(mean, std, abar_next - abar)


def log_prob(x_next: torch.Tensor, step: Transition) -> torch.Tensor:
    """Gaussian log-density of `x_next` [B, ...], averaged over the non-batch dims -> float32 [B].

    The mean over dims (not the sum) keeps clip ranges independent of resolution (DDPO lineage). The same full
    density for every sampler, CPS included, so that clip ranges mean the same everywhere.
    Raises ValueError for a deterministic step: its log-prob is undefined, not 0.
    """
    if step.std <= 0.0:
        raise ValueError("log-prob of a deterministic step is undefined; train only steps that draw noise")
    x_next = x_next.detach().float()
    z = (x_next - step.mean) / step.std
    constant = math.log(step.std) + 0.5 * math.log(2.0 * math.pi)
    return (-0.5 * z * z - constant).flatten(1).mean(dim=1)


def gaussian_kl(step: Transition, other_mean: torch.Tensor) -> torch.Tensor:
    """KL between two Gaussians of equal std, per dimension: |mean - other|^2 / (2 std^2) averaged -> [B]."""
    return ((step.mean - other_mean) ** 2).flatten(1).mean(dim=1) / (2.0 * step.std**2)
