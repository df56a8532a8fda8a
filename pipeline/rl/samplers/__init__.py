"""Samplers by name (`sampler.kind`): each file here registers one, and nothing else knows its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.registry import choose
from pipeline.rl.samplers.base import SAMPLERS, NoiseLevels, Sampler, Transition, gaussian_kl, log_prob, register

if TYPE_CHECKING:
    import torch

    from pipeline.config.schema import Config

__all__ = ["NoiseLevels", "Sampler", "Transition", "gaussian_kl", "get_sampler", "log_prob", "register", "transition"]


def get_sampler(name: str) -> Sampler:
    """Raises `ConfigError` with the nearest name."""
    return SAMPLERS.get(name)


def stochastic_samplers() -> dict[str, Sampler]:
    """Those that `sampler.kind` may name, by preference."""
    ordered = sorted(SAMPLERS.all().values(), key=lambda sampler: (sampler.preference, sampler.name))
    return {sampler.name: sampler for sampler in ordered if sampler.draws_noise}


def samplers_for(prediction: str, scheduler: str = "") -> tuple[str, ...]:
    """Names of the stochastic samplers for a model with this prediction and scheduler class, by preference."""
    fitting = [sampler for sampler in stochastic_samplers().values() if prediction in sampler.predictions]
    required = [sampler for sampler in fitting if scheduler in sampler.schedulers]
    return tuple(sampler.name for sampler in required or [s for s in fitting if not s.schedulers])


def check_sampler(cfg: Config) -> None:
    """`sampler.kind` names a stochastic sampler, and its own rules hold. Raises `ConfigError`."""
    choose(SAMPLERS.key, cfg.sampler.kind, stochastic_samplers()).check(cfg)


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
    """The Gaussian of the next sample under the sampler `kind`.

    `prediction`: flow | epsilon | v_prediction | sample. `sample`, `model_output`: [B, ...]. The noise levels are
    those of `NoiseLevels`. Raises `ConfigError` for an unknown sampler, ValueError if it does not fit the prediction.
    """
    sampler = get_sampler(kind)
    if prediction not in sampler.predictions:
        raise ValueError(
            f"sampler.kind: {kind} needs a model that predicts {' or '.join(sampler.predictions)}; this one predicts "
            f"{prediction}: use {' or '.join(samplers_for(prediction))}"
        )
    levels = NoiseLevels(sigma, sigma_next, sigma_cap)
    return sampler.step(sample.float(), model_output.float(), levels, prediction, noise_level)
