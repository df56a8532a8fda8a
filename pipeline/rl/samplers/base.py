"""What a sampler is: one stochastic step x_t -> x_next of a flow or diffusion model, and the log-prob of x_next.

Rollout and learner call the same functions on the same float32 tensors, which is what makes the replayed ratio 1.
Nothing here imports torch, so that names and checks are available before a model is loaded.

Flow conventions: t = sigma in [0, 1], x_t = (1 - t) x0 + t eps, velocity v = eps - x0, dt = t' - t < 0.
Every coefficient is computed in Python floats (float64) and applied to float32 tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.core.registry import Registry

if TYPE_CHECKING:
    import torch

    from pipeline.config.schema import Config

FLOW = ("flow",)
DIFFUSION = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, slots=True)
class Transition:
    """N(mean, std^2 I). `mean` float32 [B, ...]; `std` 0 for a deterministic step; `dt` the step's |t' - t|.

    `mask`: bool, the shape of `mean`; the values the policy really chose, where a pipeline puts others in their place
    (a given first frame, what inpainting keeps). None: all of them.
    `sharpness`: the log-prob is -sharpness |x' - mean|^2 and a constant. None: the density's own, 1 / (2 std^2).
    """

    mean: torch.Tensor
    std: float
    dt: float
    mask: torch.Tensor | None = None
    sharpness: float | None = None


@dataclass(frozen=True, slots=True)
class NoiseLevels:
    """Where a step begins and ends: flow times, or alphas_cumprod for diffusion models.

    `cap`: flow: flow-SDE's substitute for sigma = 1 in 1 / (1 - sigma); ddim: x0 is clamped to +- this (0: not);
    lcm: the scaled timestep of the boundary condition.
    """

    sigma: float
    sigma_next: float
    cap: float


class Sampler(ABC):
    """Draws the next sample of a denoising chain. A subclass is made once, without arguments, and keeps no state.

    Everything that depends on the sampler asks these attributes, never its name.
    """

    name: ClassVar[str]  # set by `register`
    predictions: ClassVar[tuple[str, ...]]  # what the model may predict: flow | epsilon | v_prediction | sample
    schedulers: ClassVar[tuple[str, ...]] = ()  # scheduler classes it is made for, which then need it; (): all others
    default_noise: ClassVar[float] = 1.0  # a noise level that suits it
    draws_noise: ClassVar[bool] = True  # else it cannot train, and sampler.kind may not name it
    preference: ClassVar[int] = 100  # of several that fit a model, the lowest is suggested first

    @abstractmethod
    def step(
        self, x: torch.Tensor, out: torch.Tensor, levels: NoiseLevels, prediction: str, noise_level: float
    ) -> Transition:
        """The Gaussian of the next sample. `x`, `out`: sample and model output, float32 [B, ...]."""

    def check(self, cfg: Config) -> None:
        """Rules of consistency that concern this sampler alone. Raises `ConfigError` naming the key and the fix."""
        return None


SAMPLERS: Registry[Sampler] = Registry("sampler.kind", "pipeline.rl.samplers", lambda cls: cls())
register = SAMPLERS.register


def flow_step(x: torch.Tensor, v: torch.Tensor, t: float, t_next: float, g: float) -> Transition:
    """Marginal-preserving reverse SDE with noise g_t (Flow-GRPO, arXiv 2505.05470, eq. 9; g = 0 is Euler).

    mean = x (1 + g^2 dt / 2t) + v (1 + g^2 (1 - t) / 2t) dt,  std = g sqrt(-dt)
    """
    dt = t_next - t
    if g == 0.0:
        return Transition(x + v * dt, 0.0, -dt)
    half = g * g / (2.0 * t)
    mean = x * (1.0 + half * dt) + v * ((1.0 + half * (1.0 - t)) * dt)
    return Transition(mean, g * math.sqrt(-dt), -dt)


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


def log_prob(x_next: torch.Tensor, step: Transition) -> torch.Tensor:
    """Log-prob of `x_next` [B, ...], averaged over the non-batch dims (within `step.mask`) -> float32 [B].

    The Gaussian's log-density, or -sharpness |x_next - mean|^2 where the sampler's likelihood has a sharpness of its
    own. The mean over dims (not the sum) keeps clip ranges independent of resolution (DDPO lineage).
    Raises ValueError for a deterministic step: its log-prob is undefined, not 0.
    """
    if step.std <= 0.0:
        raise ValueError("log-prob of a deterministic step is undefined; train only steps that draw noise")
    x_next = x_next.detach().float()
    if step.sharpness is not None:
        return _mean(-step.sharpness * (x_next - step.mean) ** 2, step.mask)
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
    """KL between two Gaussians of equal std, per dimension: |mean - other|^2 / (2 std^2) averaged -> [B].

    With the step's own sharpness in place of 1 / (2 std^2), so that it weighs the steps as the log-prob does.
    """
    distance = _mean((step.mean - other_mean) ** 2, step.mask)
    return distance * step.sharpness if step.sharpness is not None else distance / (2.0 * step.std**2)
