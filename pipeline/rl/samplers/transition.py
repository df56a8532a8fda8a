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
CONSISTENCY_KINDS = ("lcm",)


@dataclass(frozen=True, slots=True)
class Transition:
    """N(mean, std^2 I). `mean` float32 [B, ...]; `std` 0 for a deterministic step; `dt` the step's |t' - t|.

    `mask`: bool, the shape of `mean`; the values the policy really chose, where a pipeline puts others in their place
    (a given first frame, what inpainting keeps). None: all of them.
    """

    mean: torch.Tensor
    std: float
    dt: float
    mask: torch.Tensor | None = None


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

    `kind`: flow_sde | dance_sde | cps | ddim | lcm | ode. `prediction`: flow | epsilon | v_prediction | sample.
    `sample`, `model_output`: [B, ...]. `sigma`, `sigma_next`: flow times, or alphas_cumprod for diffusion models.
    `sigma_cap`: flow: flow-SDE's substitute for sigma = 1 in 1 / (1 - sigma); ddim: x0 is clamped to +- this (0: not);
    lcm: the scaled timestep of the boundary condition. Raises ValueError for a kind that does not fit the prediction.
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
    if kind == "lcm":
        return lcm_step(x, out, sigma, sigma_next, sigma_cap, prediction)
    if kind in ("ode", "ddim"):
        eta = 0.0 if kind == "ode" else noise_level
        return ddim_step(x, out, sigma, sigma_next, eta, prediction, sigma_cap)
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


def clean_and_noise(
    x: torch.Tensor, out: torch.Tensor, abar: float, prediction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x0, eps) that a diffusion model's output stands for."""
    a, b = math.sqrt(abar), math.sqrt(1.0 - abar)
    if prediction == "epsilon":
        return (x - b * out) / a, out
    if prediction == "v_prediction":
        return a * x - b * out, a * out + b * x
    if prediction == "sample":
        return out, (x - a * out) / b
    raise ValueError(f"unknown prediction type {prediction!r}; known: flow, epsilon, v_prediction, sample")


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

    The noise is the model's own, so `noise_level` has no part in it.
    """
    denoised = consistency_function(x, out, abar, scaled_t, prediction)
    return Transition(math.sqrt(abar_next) * denoised, math.sqrt(1.0 - abar_next), abs(abar_next - abar))


def log_prob(x_next: torch.Tensor, step: Transition) -> torch.Tensor:
    """Gaussian log-density of `x_next` [B, ...], averaged over the non-batch dims (within `step.mask`) -> float32 [B].

    The mean over dims (not the sum) keeps clip ranges independent of resolution (DDPO lineage). The same full
    density for every sampler, CPS included, so that clip ranges mean the same everywhere.
    Raises ValueError for a deterministic step: its log-prob is undefined, not 0.
    """
    if step.std <= 0.0:
        raise ValueError("log-prob of a deterministic step is undefined; train only steps that draw noise")
    x_next = x_next.detach().float()
    z = (x_next - step.mean) / step.std
    constant = math.log(step.std) + 0.5 * math.log(2.0 * math.pi)
    return _mean(-0.5 * z * z - constant, step.mask)


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, ...] -> [B], over the values the policy chose."""
    if mask is None:
        return values.flatten(1).mean(dim=1)
    chosen = mask.flatten(1).to(values.dtype)
    return (values.flatten(1) * chosen).sum(dim=1) / chosen.sum(dim=1)


def gaussian_kl(step: Transition, other_mean: torch.Tensor) -> torch.Tensor:
    """KL between two Gaussians of equal std, per dimension: |mean - other|^2 / (2 std^2) averaged -> [B]."""
    return _mean((step.mean - other_mean) ** 2, step.mask) / (2.0 * step.std**2)
