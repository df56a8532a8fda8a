"""The first-order time grid in place of a pipeline's scheduler, and the noise levels of each of its steps.

The recorder draws policy steps on this grid, and the learner replays them at the recorded levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    LTXEulerAncestralRFScheduler,
)

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.rl.samplers import NoiseLevels, samplers_for

# Kept as they are: their grid is DDIM's, and some pipelines check the class.
_FIRST_ORDER = (DDIMScheduler, CogVideoXDDIMScheduler, LCMScheduler)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Noise levels of a step. Flow: sigma, falling from 1 to 0 in any scheduler's direction. Others: alphas_cumprod."""

    sigma: float
    sigma_next: float
    cap: float  # see types.RecordedStep.sigma_cap
    flip: bool = False  # the scheduler runs from 0 to 1 (OmniGen, Mochi), so its velocity has the other sign

    @property
    def levels(self) -> NoiseLevels:
        return NoiseLevels(self.sigma, self.sigma_next, self.cap)


def prediction_of(scheduler: Any) -> str:
    """What the denoiser predicts: flow | epsilon | v_prediction | sample. Raises UnsupportedPolicyError."""
    name, kind = type(scheduler).__name__, scheduler.config.get("prediction_type")
    named = "FlowMatch" in name or isinstance(scheduler, LTXEulerAncestralRFScheduler)
    if named or scheduler.config.get("use_flow_sigmas") or kind == "flow_prediction":
        return "flow"
    if scheduler.config.get("timestep_type") == "continuous":
        raise UnsupportedPolicyError(
            f"scheduler {name} with timestep_type 'continuous' (EDM noise levels) has no first-order counterpart here: "
            "its model takes log sigma as the timestep, which DDIM and flow grids do not give"
        )
    if kind in ("epsilon", "v_prediction", "sample") and hasattr(scheduler, "alphas_cumprod"):
        return kind
    raise UnsupportedPolicyError(
        f"scheduler {name} (prediction_type {kind!r}) has no first-order counterpart: it is neither a flow scheduler "
        "nor one with alphas_cumprod; models trained with it cannot be sampled by flow-SDE or DDIM"
    )


def is_consistency(scheduler: Any) -> bool:
    """Whether its steps jump to x0 and add noise again (latent consistency models)."""
    return isinstance(scheduler, LCMScheduler)


def kinds_for(scheduler: Any, prediction: str) -> tuple[str, ...]:
    """Samplers (`sampler.kind`) that fit the scheduler, best first."""
    return samplers_for(prediction, type(scheduler).__name__)


def _no_begin_index(begin_index: int = 0) -> None:
    """DDIM finds its position by the timestep."""


def _first_order_flow(scheduler: Any) -> Any:
    """The scheduler itself, or the one that takes one model call per step on its grid and draws no noise."""
    config = scheduler.config
    if isinstance(scheduler, FlowMatchLCMScheduler) and config.get("scale_factors"):
        raise UnsupportedPolicyError(
            "scheduler FlowMatchLCMScheduler with scale_factors changes the latents' size between its steps; such a "
            "step has no log-prob"
        )
    if isinstance(scheduler, (FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)):
        return FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False)
    if getattr(scheduler, "order", 1) != 1:
        raise UnsupportedPolicyError(
            f"scheduler {type(scheduler).__name__} takes {scheduler.order} model calls per step; "
            "use FlowMatchEulerDiscreteScheduler"
        )
    if isinstance(scheduler, LTXEulerAncestralRFScheduler):
        return type(scheduler).from_config(config, eta=0.0)
    if config.get("stochastic_sampling"):
        return type(scheduler).from_config(config, stochastic_sampling=False)
    if str(config.get("algorithm_type")).startswith("sde-"):
        return type(scheduler).from_config(config, algorithm_type=config["algorithm_type"].removeprefix("sde-"))
    return scheduler


def first_order_scheduler(pipe: Any) -> str:
    """Replaces the checkpoint's scheduler by a first-order one where it is not one; returns the prediction type.

    Flow schedulers of order 1 keep their own sigmas (their `step` is replaced anyway). Diffusion models get DDIM,
    whose latents are not rescaled by sigma as in the Euler and LMS families.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "step"):
        raise UnsupportedPolicyError(f"{type(pipe).__name__} has no component called scheduler, so no steps to train")
    prediction = prediction_of(scheduler)
    if prediction == "flow":
        pipe.scheduler = _first_order_flow(scheduler)
        return prediction
    if isinstance(scheduler, CogVideoXDPMScheduler):
        pipe.scheduler = CogVideoXDDIMScheduler.from_config(scheduler.config)
    elif not isinstance(scheduler, _FIRST_ORDER) or scheduler.config.get("thresholding"):
        clip = bool(scheduler.config.get("clip_sample", False))
        pipe.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=clip, thresholding=False)
        if hasattr(scheduler, "set_begin_index"):
            pipe.scheduler.set_begin_index = _no_begin_index  # some pipelines call it without checking that it exists
    ours, theirs = pipe.scheduler.alphas_cumprod, scheduler.alphas_cumprod
    if ours.shape != theirs.shape or not torch.allclose(ours.float(), theirs.float(), atol=1e-5):
        raise UnsupportedPolicyError(
            f"scheduler {type(scheduler).__name__} has no first-order counterpart: its alphas_cumprod differ from "
            f"those of {type(pipe.scheduler).__name__} by up to {float((ours[-1] - theirs[-1]).abs()):.1e}"
        )
    return prediction


def _position(scheduler: Any, count: int, timestep: Any) -> int:
    """Index into the scheduler's grid of the step that is being taken."""
    index = count + (getattr(scheduler, "begin_index", None) or 0)
    value = torch.as_tensor(timestep).flatten()
    grid = scheduler.timesteps
    if value.numel() != 1 or (index < len(grid) and float(grid[index]) == float(value)):
        return index
    same = (grid.float().cpu() == value.float().cpu()).nonzero().flatten().tolist()
    if not same:
        raise UnsupportedPolicyError(f"timestep {float(value):.4g} is not on the grid of {type(scheduler).__name__}")
    return next((i for i in same if i >= index), same[-1])


def step_times(scheduler: Any, prediction: str, count: int, timestep: Any) -> tuple[StepTimes, int]:
    """Times of step number `count`, and its index on the scheduler's grid."""
    index = _position(scheduler, count, timestep)
    if prediction == "flow":
        sigmas = scheduler.sigmas
        now, then = float(sigmas[index]), float(sigmas[index + 1])
        second = float(sigmas[1])
        flip = then > now
        if flip:
            now, then, second = 1.0 - now, 1.0 - then, 1.0 - second
        return StepTimes(now, then, second if len(sigmas) > 2 else 0.5, flip), index
    t = int(timestep)
    table = scheduler.alphas_cumprod
    if is_consistency(scheduler):
        after = scheduler.timesteps[index + 1] if index + 1 < len(scheduler.timesteps) else t
        return StepTimes(float(table[t]), float(table[int(after)]), t * scheduler.config.timestep_scaling), index
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    then = table[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    clips = isinstance(scheduler, DDIMScheduler) and scheduler.config.clip_sample  # CogVideoX's ignores the flag
    clip = float(scheduler.config.clip_sample_range) if clips else 0.0
    return StepTimes(float(table[t]), float(then), clip), index


def levels_from(scheduler: Any, prediction: str, position: int) -> tuple[NoiseLevels, ...]:
    """Noise levels of the steps from `position` on the scheduler's grid to its end."""
    begin = getattr(scheduler, "begin_index", None) or 0
    levels = []
    for index in range(position, len(scheduler.timesteps)):
        times, _ = step_times(scheduler, prediction, index - begin, scheduler.timesteps[index])
        levels.append(times.levels)
    return tuple(levels)
