"""Runs a diffusers pipeline unchanged while its scheduler draws policy steps and its denoiser calls are recorded.

The pipeline keeps its own loop, guidance, conditions and decoding. Two things are replaced for one call:
`scheduler.step` (draws from `samplers.transition` with each take's own generator) and, through hooks, nothing but a
look at what each denoiser is called with. Inputs are cloned at call time, since some pipelines edit in place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from pipeline.errors import UnsupportedPolicyError
from pipeline.samplers import log_prob, transition
from pipeline.types import SamplingSpec
from pipeline.wire import map_leaves

_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)


@dataclass(slots=True)
class RawCall:
    """One denoiser call as it happened: trees of cloned tensors, and the identity of each original."""

    module: str
    args: Any
    kwargs: Any
    origin: dict[str, tuple[int, int]]  # leaf path -> (id, in-place version) of the original tensor
    output: torch.Tensor | None = None


@dataclass(slots=True)
class RawStep:
    """One scheduler step as it happened. Tensors [B, ...] in the pipeline's dtype unless said otherwise."""

    index: int
    sigma: float
    sigma_next: float
    sigma_cap: float
    guidance_scale: float
    sample: torch.Tensor
    model_output: torch.Tensor
    next_sample: torch.Tensor
    mean: torch.Tensor  # float32
    log_prob: torch.Tensor | None  # float32 [B]; None where the step is deterministic
    calls: list[RawCall]


@dataclass(slots=True)
class Recording:
    """What one pipeline call left behind."""

    steps: list[RawStep] = field(default_factory=list)
    # (id, in-place version) -> (original, its clone); holding the original keeps its id unique
    clones: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    num_steps: int = 0
    denoise_started: float = 0.0
    denoise_ended: float = 0.0
    last_next: torch.Tensor | None = None
    continuous: bool = True  # every step was given exactly what the step before returned


def first_tensor(output: Any) -> torch.Tensor:
    """The tensor of a denoiser's output: itself, the first of a tuple, or `.sample`."""
    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "sample"):
        return output.sample
    return output[0]


def scheduler_times(scheduler: Any, prediction: str, index: int, timestep: Any) -> tuple[float, float, float]:
    """(sigma, sigma_next, sigma_cap) of step `index`; alphas_cumprod in place of sigma for diffusion models."""
    if prediction == "flow":
        sigmas = scheduler.sigmas
        cap = float(sigmas[1]) if len(sigmas) > 2 else 0.5
        return float(sigmas[index]), float(sigmas[index + 1]), cap
    t = int(timestep)
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    final = scheduler.final_alpha_cumprod
    abar_next = scheduler.alphas_cumprod[previous] if previous >= 0 else final
    return float(scheduler.alphas_cumprod[t]), float(abar_next), 0.0


@contextmanager
def record(
    pipe: Any,
    denoisers: dict[str, torch.nn.Module],
    prediction: str,
    sampling: SamplingSpec,
    generators: list[torch.Generator],
    *,
    keep_steps: set[int],
    keep_outputs: bool = False,
) -> Iterator[Recording]:
    """Patches the pipeline for the duration of one call and yields the growing recording.

    `generators`: one CPU generator per take for the policy's noise, so a take does not depend on its batch.
    `keep_steps`: step indices whose inputs are stored. `keep_outputs`: also store denoiser outputs (probing).
    """
    scheduler = pipe.scheduler
    recording = Recording()
    pending: list[RawCall] = []
    count = 0

    def before(name: str):
        def hook(_module, args, kwargs):
            if not recording.denoise_started:
                recording.denoise_started = time.perf_counter()
            if count in keep_steps:
                pending.append(_clone_call(name, args, kwargs, recording.clones))

        return hook

    def after(_module, _args, _kwargs, output):
        if keep_outputs and count in keep_steps:
            pending[-1].output = first_tensor(output).detach().clone()

    def step(model_output, timestep, sample, *_args, return_dict=True, **_kwargs):
        nonlocal count
        index = count + (scheduler.begin_index or 0 if hasattr(scheduler, "begin_index") else 0)
        sigma, sigma_next, cap = scheduler_times(scheduler, prediction, index, timestep)
        noisy = count in sampling.stochastic_steps
        kind = sampling.kind if noisy else "ode"
        moved = transition(kind, sampling.noise_level, prediction, sample, model_output, sigma, sigma_next, cap)
        next_sample, logp = moved.mean, None
        if noisy:
            if sample.shape[0] != len(generators):
                raise UnsupportedPolicyError(
                    f"{type(pipe).__name__} hands the scheduler {sample.shape[0]} samples for {len(generators)} takes; "
                    "frames folded into the batch are not supported"
                )
            noise = torch.stack([torch.randn(sample.shape[1:], generator=g) for g in generators])
            next_sample = moved.mean + moved.std * noise.to(moved.mean.device)
        # Rounded to the pipeline's dtype before its log-prob is taken: replay sees exactly this tensor.
        next_sample = next_sample.to(sample.dtype)
        if noisy:
            logp = log_prob(next_sample, moved)
        if recording.last_next is not None and not torch.equal(recording.last_next, sample):
            recording.continuous = False
        if count in keep_steps:
            recording.steps.append(
                RawStep(
                    index=count,
                    sigma=sigma,
                    sigma_next=sigma_next,
                    sigma_cap=cap,
                    guidance_scale=float(getattr(pipe, "guidance_scale", sampling.guidance_scale) or 0.0),
                    sample=sample.detach().clone(),
                    model_output=model_output.detach().clone() if keep_outputs else model_output,
                    next_sample=next_sample.detach().clone(),
                    mean=moved.mean,
                    log_prob=logp,
                    calls=list(pending),
                )
            )
        pending.clear()
        count += 1
        recording.num_steps = count
        recording.last_next = next_sample.detach().clone()
        recording.denoise_ended = time.perf_counter()
        if getattr(scheduler, "_step_index", None) is None:
            scheduler._step_index = index
        scheduler._step_index = index + 1
        return SchedulerOutput(prev_sample=next_sample) if return_dict else (next_sample,)

    hooks = []
    for name, module in denoisers.items():
        hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))
    scheduler.step = step
    try:
        yield recording
    finally:
        del scheduler.step  # the class's own method shows again
        for hook in hooks:
            hook.remove()


def _clone_call(name: str, args: Any, kwargs: Any, clones: dict[tuple[int, int], tuple[Any, Any]]) -> RawCall:
    origin: dict[str, tuple[int, int]] = {}

    def clone(path: str, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            key = origin[path] = (id(leaf), leaf._version)
            if key not in clones:
                clones[key] = (leaf, leaf.detach().clone())
            return clones[key][1]
        if isinstance(leaf, _PLAIN):
            return leaf
        raise UnsupportedPolicyError(
            f"{name} is called with {path.split('.', 1)[-1]} of type {type(leaf).__name__}, "
            "which cannot be recorded and replayed"
        )

    tree = map_leaves(clone, {"args": tuple(args), "kwargs": dict(kwargs)})
    return RawCall(module=name, args=tree["args"], kwargs=tree["kwargs"], origin=origin)
