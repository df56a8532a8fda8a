"""A policy step in place of the scheduler's own: its Gaussian, its clean prediction, and what the pipeline kept of it.

The formulas are those of `pipeline.rl.samplers`; this file knows which of them a scheduler class calls for.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import SamplingSpec
from pipeline.generators.noising import consistency_transition
from pipeline.generators.record.first_order import StepTimes, is_consistency
from pipeline.generators.record.recording import RawStep, Recording
from pipeline.rl.samplers import Transition, log_prob, transition


def policy_transition(
    scheduler: Any,
    sampling: SamplingSpec,
    prediction: str,
    x: torch.Tensor,
    out: torch.Tensor,
    times: StepTimes,
    *,
    noisy: bool,
    last: bool,
    generator: Any,
) -> Transition:
    """The step's Gaussian; a deterministic one where the policy draws no noise (`noisy` false).

    `generator`: the pipeline's own, used by samplers that need noise at every step.
    """
    if not is_consistency(scheduler):
        kind = sampling.kind if noisy else "ode"
        return transition(kind, sampling.noise_level, prediction, x, out, times.sigma, times.sigma_next, times.cap)
    consistency = consistency_transition(prediction, times.levels, x, out, last and not noisy)
    if noisy or last:
        return consistency
    # Noise is part of the LCM sampler itself: without the policy's, it comes from the pipeline's own generators.
    sources = generator if isinstance(generator, list) else [generator] * x.shape[0]
    noise = torch.stack([torch.randn(x.shape[1:], generator=source, dtype=x.dtype) for source in sources])
    return replace(consistency, mean=consistency.mean + consistency.std * noise.to(x.device).float())


def infer_mask(step: RawStep, sample: torch.Tensor, recording: Recording, pipeline: str) -> None:
    """Sets which values of a step's result the pipeline kept, now that the next step's `sample` is known. Where it
    rounded all of them to 16 bits, the step's result is what it rounded them to.

    Raises UnsupportedPolicyError where it kept none, or changed the sample's shape.
    """
    if sample.shape != step.next_sample.shape:
        raise UnsupportedPolicyError(
            f"{pipeline} changes the sample's shape after step {step.index}, from {list(step.next_sample.shape)} to "
            f"{list(sample.shape)}; such a step has no log-prob"
        )
    kept = sample == step.next_sample
    if bool(kept.all()):
        return
    if any(bool((sample == step.next_sample.to(dtype)).all()) for dtype in (torch.bfloat16, torch.float16)):
        step.next_sample = sample.detach().clone()
    else:
        recording.chosen_share = min(recording.chosen_share, float(kept.float().mean()))
        if not bool(kept.flatten(1).any(1).all()):
            raise UnsupportedPolicyError(
                f"{pipeline} replaces every value of the sample after step {step.index}; nothing that the policy "
                "chooses is kept"
            )
        step.mask = kept
    if step.log_prob is not None:
        step.log_prob = log_prob(step.next_sample, Transition(step.mean, step.std, 0.0, step.mask, step.sharpness))


def check_first_step(scheduler: Any, ours: torch.Tensor, arguments: dict[str, Any]) -> None:
    """Compares our first step without noise, `ours`, with the scheduler's own for the same `arguments` of `step`.

    Multi-step solvers start with a first-order step, so this holds for them too. Raises UnsupportedPolicyError with
    the difference.
    """
    if is_consistency(scheduler):
        return  # draws noise of its own
    try:
        theirs = copy.deepcopy(scheduler).step(**arguments, return_dict=False)[0]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return  # its step cannot be called on its own
    if theirs.shape != ours.shape:
        return
    per_token = arguments.get("per_token_timesteps")
    if per_token is not None:  # tokens at another timestep are conditions, which the pipeline restores
        ours = torch.where((per_token == arguments["timestep"]).unsqueeze(-1), ours, theirs.float())
    sample = arguments["sample"]
    distance = float((theirs.float() - sample.float()).abs().max())
    error = float((theirs.float() - ours.float()).abs().max())
    # Schedulers compute in the model output's dtype, or return it.
    eps = max(torch.finfo(dtype).eps for dtype in (theirs.dtype, arguments["model_output"].dtype))
    rounding = eps * float(theirs.abs().max())
    if error > (1e-3 if sample.dtype == torch.float32 else 5e-2) * max(distance, 1e-6) + rounding + 1e-6:
        raise UnsupportedPolicyError(
            f"the first step without noise differs from that of {type(scheduler).__name__} by {error:.1e} (it moves by "
            f"{distance:.1e}): the scheduler has no first-order counterpart here, or is called in an unknown way"
        )
