"""Runs a diffusers pipeline unchanged while its scheduler draws policy steps and its denoiser calls are recorded.

The pipeline keeps its own loop, guidance, conditions and decoding. Two things are replaced for one call:
`scheduler.step` (draws from `samplers.transition` with each take's own generator) and, through hooks, nothing but a
look at what each denoiser is called with. Inputs are cloned at call time, since some pipelines edit in place.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.tensors import map_leaves
from pipeline.core.types import SamplingSpec
from pipeline.generators.record.attention import changed, processors_of, restore_processors
from pipeline.generators.record.first_order import step_times
from pipeline.generators.record.outputs import first_tensor, is_first_alone, replace_first
from pipeline.generators.record.shared_prefix import SharedPrefix
from pipeline.rl.samplers import log_prob, transition
from pipeline.rl.samplers.base import Transition, clean_and_noise
from pipeline.rl.samplers.lcm import consistency_function

_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device, np.generic, slice)


@dataclass(slots=True)
class RawCall:
    """One denoiser call as it happened: trees of cloned tensors, and the identity of each original."""

    module: str
    args: Any
    kwargs: Any
    origin: dict[str, tuple[int, int]]  # leaf path -> (id, in-place version) of the original tensor
    output: torch.Tensor | None = None
    processors: dict[str, str] = field(default_factory=dict)  # see generators.attention


@dataclass(slots=True)
class RawStep:
    """One scheduler step as it happened. Tensors [B, ...], B takes, in the pipeline's dtype unless said otherwise;
    frames that a pipeline folds into the batch are unfolded into axis 1."""

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
    std: float = 0.0
    rule: str = "identity"
    rule_extra: tuple[float, ...] = ()
    mask: torch.Tensor | None = None  # bool, like next_sample; None: the policy chose every value


@dataclass(slots=True)
class Recording:
    """What one pipeline call left behind."""

    steps: list[RawStep] = field(default_factory=list)
    # (id, in-place version) -> (original, its clone); holding the original keeps its id unique
    clones: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    num_steps: int = 0
    denoise_started: float = 0.0
    denoise_ended: float = 0.0
    final: torch.Tensor | None = None  # [takes, ...], what the last step gave
    chosen_share: float = 1.0  # share of the latent values that the policy chose, least over the steps
    stopped: bool = False


class StopRecording(Exception):
    """Ends a probing run once its steps are recorded, before the VAE decodes."""


class _PolicyStep:
    """Stands in for `scheduler.step`. A copy of the scheduler (for a second modality) gets its own step back."""

    def __init__(self, scheduler: Any, act: Callable[..., Any]) -> None:
        own = type(scheduler).step
        self._scheduler, self._own, self._act = scheduler, own, act
        parameters = list(inspect.signature(own).parameters.values())
        self.__signature__ = inspect.Signature(parameters[1:])  # pipelines look for eta and generator

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        known = self.__signature__.parameters  # a step of another scheduler may have been given more
        given = self.__signature__.bind(*args, **{k: v for k, v in kwargs.items() if k in known}).arguments
        return self._act(**{"generator": None, "return_dict": True, **given})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._scheduler))
        return self if copied is None else MethodType(self._own, copied)  # None: its __dict__ alone is copied


@contextmanager
def record(
    pipe: Any,
    denoisers: dict[str, torch.nn.Module],
    prediction: str,
    sampling: SamplingSpec,
    generators: list[torch.Generator],
    *,
    keep_steps: set[int],
    on_step: Callable[[RawStep], None] | None = None,
    on_output: Callable[[int, str, torch.Tensor], torch.Tensor] | None = None,
    stop_early: bool = False,
    keep_graph: bool = False,
    samples: dict[int, torch.Tensor] | None = None,
    check_first: bool = False,
    twins: SharedPrefix | None = None,
) -> Iterator[Recording]:
    """Patches the pipeline for the duration of one call and yields the growing recording.

    `generators`: one CPU generator per take for the policy's noise, so a take does not depend on its batch.
    `keep_steps`: step indices whose inputs are stored. `on_step` sees each of them with its outputs and may fill in
    the guidance; the outputs are then dropped unless it is None. `on_output` may replace a denoiser's output.
    `stop_early`: the call is ended as soon as the kept steps are complete (`recording.stopped`). `keep_graph`:
    recorded inputs stay differentiable. `samples`: what steps after the first are given, whatever the one before gave.
    `check_first`: the first step without noise is compared with the scheduler's own (UnsupportedPolicyError where they
    differ). `twins`: takes that are computed as one until their ways part.
    """
    scheduler = pipe.scheduler
    recording = Recording()
    pending: list[RawCall] = []
    cuts: list[Any] = []  # of the calls of this step: the inputs of all takes where one of each kind was given, or None
    open_step: RawStep | None = None  # its mask shows only when the next step's sample is seen
    count = 0
    takes = len(generators)

    def before(name: str):
        def hook(_module, args, kwargs):
            if not recording.denoise_started:
                recording.denoise_started = time.perf_counter()
            if count in keep_steps:
                pending.append(_clone_call(name, args, kwargs, recording.clones, keep_graph))
                pending[-1].processors = changed(denoisers[name], processors[name])
            few = twins.cut(len(cuts), args, kwargs) if twins is not None and count < twins.until else None
            cuts.append(None if few is None else (args, kwargs))
            return few

        return hook

    def after(name: str):
        def hook(module, _args, _kwargs, output):
            if cuts[-1] is not None and is_first_alone(output):
                output = replace_first(output, twins.spread(len(cuts) - 1, first_tensor(output)))
            elif cuts[-1] is not None:  # where takes are in further outputs is not known
                twins.helps = False
                output = module.forward(*cuts[-1][0], **cuts[-1][1])
            if on_output is not None:
                output = replace_first(output, on_output(count, name, first_tensor(output)))
            if count in keep_steps:
                pending[-1].output = first_tensor(output).detach().clone()
            return output

        return hook

    def unfold(tensor: torch.Tensor) -> torch.Tensor:
        """[takes x frames, ...] -> [takes, frames, ...]"""
        if tensor.shape[0] == takes:
            return tensor
        if tensor.shape[0] % takes:
            raise UnsupportedPolicyError(
                f"{type(pipe).__name__} hands the scheduler {tensor.shape[0]} samples for {takes} takes"
            )
        return tensor.unflatten(0, (takes, tensor.shape[0] // takes))

    def act(model_output, timestep, sample, generator, return_dict, **rest):
        nonlocal count, open_step
        given = model_output
        if rest.get("per_token_timesteps") is not None:  # FlowMatchEuler then steps the other way (LTXCondition)
            model_output = -model_output
        times, index = step_times(scheduler, prediction, count, timestep)
        shape = sample.shape
        if model_output.shape != shape and model_output.shape[1] == 2 * shape[1]:
            model_output = model_output[:, : shape[1]]  # the learned-variance half, which DDPM's step takes apart
        if model_output.shape != shape:
            raise UnsupportedPolicyError(
                f"{type(pipe).__name__} hands the scheduler {list(model_output.shape)} for a sample {list(shape)}"
            )
        x, out = unfold(sample), unfold(-model_output if times.flip else model_output)
        if open_step is not None:
            _infer_mask(open_step, x, recording, type(pipe).__name__)
            open_step = None
        if stop_early and count > max(keep_steps):
            recording.stopped = True
            raise StopRecording
        if check_first and count == 0:
            still = _policy_transition(
                scheduler, sampling, prediction, x, out, times, False, False, generator
            ).mean.reshape(shape)
            _compare_with_own(scheduler, still, {"model_output": given, "timestep": timestep, "sample": sample, **rest})
        last = index + 1 >= len(scheduler.timesteps)
        noisy = count in sampling.stochastic_steps
        moved = _policy_transition(scheduler, sampling, prediction, x, out, times, noisy, last, generator)
        next_sample = moved.mean
        if noisy:
            noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
            next_sample = moved.mean + moved.std * noise.to(moved.mean.device)
        if samples is not None and count + 1 in samples:
            next_sample = samples[count + 1].to(next_sample.device)
        # Rounded to the pipeline's dtype before its log-prob is taken: replay sees exactly this tensor.
        next_sample = next_sample.to(sample.dtype)
        if count in keep_steps:
            open_step = RawStep(
                index=count,
                sigma=times.sigma,
                sigma_next=times.sigma_next,
                sigma_cap=times.cap,
                guidance_scale=_number(getattr(pipe, "guidance_scale", None), sampling.guidance_scale),
                sample=x.detach().clone(),
                model_output=out.detach().clone(),
                next_sample=next_sample.detach().clone(),
                mean=moved.mean,
                log_prob=log_prob(next_sample, moved) if noisy and moved.std > 0 else None,
                calls=list(pending),
                std=moved.std if noisy else 0.0,
            )
            if on_step is not None:
                on_step(open_step)
                for call in open_step.calls:
                    call.output = None
            recording.steps.append(open_step)
        pending.clear()
        cuts.clear()
        count += 1
        recording.num_steps = count
        recording.final = next_sample.detach()
        recording.denoise_ended = time.perf_counter()
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = index + 1
        clean = _clean(scheduler, prediction, x, out, times).to(sample.dtype).reshape(shape)
        moved_on = next_sample.reshape(shape)
        if return_dict:
            return DDIMSchedulerOutput(prev_sample=moved_on, pred_original_sample=clean)
        return (moved_on,) if prediction == "flow" else (moved_on, clean)

    hooks = []
    processors = {name: processors_of(module) for name, module in denoisers.items()}
    for name, module in denoisers.items():
        hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        hooks.append(module.register_forward_hook(after(name), with_kwargs=True))
    scheduler.step = _PolicyStep(scheduler, act)
    try:
        yield recording
    except StopRecording:
        pass
    finally:
        for name, own in processors.items():  # the pipeline may have had no chance to take its own ones away
            restore_processors(denoisers[name], own)
        scheduler.__dict__.pop("step", None)  # the class's own method shows again
        for hook in hooks:
            hook.remove()


def _compare_with_own(scheduler: Any, ours: torch.Tensor, given: dict[str, Any]) -> None:
    """The scheduler's own first step must be the one that is taken here without noise: multi-step solvers start with a
    first-order step, so this holds for them too. Raises UnsupportedPolicyError with the difference."""
    if isinstance(scheduler, LCMScheduler):
        return  # draws noise of its own
    try:
        theirs = copy.deepcopy(scheduler).step(**given, return_dict=False)[0]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return  # it cannot be asked out of turn
    if theirs.shape != ours.shape:
        return
    per_token = given.get("per_token_timesteps")
    if per_token is not None:  # tokens at another timestep are conditions, which the pipeline puts back
        ours = torch.where((per_token == given["timestep"]).unsqueeze(-1), ours, theirs.float())
    moved = float((theirs.float() - given["sample"].float()).abs().max())
    gap = float((theirs.float() - ours.float()).abs().max())
    if gap > (1e-3 if given["sample"].dtype == torch.float32 else 5e-2) * max(moved, 1e-6) + 1e-6:
        raise UnsupportedPolicyError(
            f"the first step without noise differs from that of {type(scheduler).__name__} by {gap:.1e} (it moves by "
            f"{moved:.1e}): the scheduler has no first-order counterpart here, or is called in a way that is not known"
        )


def _number(value: Any, default: float) -> float:
    """A scale as a float; `default` where the pipeline has none, or one per frame."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        return default
    try:
        return float(value)
    except (TypeError, ValueError):
        return default


def _policy_transition(
    scheduler: Any, sampling: SamplingSpec, prediction: str, x, out, times, noisy: bool, last: bool, generator: Any
) -> Transition:
    """The step's Gaussian; a deterministic one where the policy draws no noise."""
    if not isinstance(scheduler, LCMScheduler):
        kind = sampling.kind if noisy else "ode"
        return transition(kind, sampling.noise_level, prediction, x, out, times.sigma, times.sigma_next, times.cap)
    moved = transition("lcm", 1.0, prediction, x, out, times.sigma, times.sigma_next, times.cap)
    if noisy:
        return moved
    if last:
        return replace(moved, mean=consistency_function(x.float(), out.float(), times.sigma, times.cap, prediction))
    # Noise belongs to the sampler itself: without the policy's, it comes from the pipeline's own generators.
    sources = generator if isinstance(generator, list) else [generator] * x.shape[0]
    noise = torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in sources])
    return replace(moved, mean=moved.mean + moved.std * noise.to(x.device).float())


def _clean(scheduler: Any, prediction: str, x, out, times) -> torch.Tensor:
    """The x0 prediction, which some pipelines read from the scheduler's answer."""
    x, out = x.float(), out.float()
    if prediction == "flow":
        return x - times.sigma * out
    if isinstance(scheduler, LCMScheduler):
        return consistency_function(x, out, times.sigma, times.cap, prediction)
    if times.sigma == 0.0 and prediction == "epsilon":
        return torch.zeros_like(x)
    return clean_and_noise(x, out, times.sigma, prediction)[0]


def _infer_mask(step: RawStep, sample: torch.Tensor, recording: Recording, name: str) -> None:
    """Finds what the pipeline kept of a step, now that the next step's sample is known."""
    if sample.shape != step.next_sample.shape:
        raise UnsupportedPolicyError(
            f"{name} changes the sample's shape after step {step.index}, from {list(step.next_sample.shape)} to "
            f"{list(sample.shape)}; such a step has no log-prob"
        )
    kept = sample == step.next_sample
    if bool(kept.all()):
        return
    share = float(kept.float().mean())
    recording.chosen_share = min(recording.chosen_share, share)
    if not bool(kept.flatten(1).any(1).all()):
        raise UnsupportedPolicyError(
            f"{name} replaces every value of the sample after step {step.index}; the policy chooses nothing that lasts"
        )
    step.mask = kept
    if step.log_prob is not None:
        step.log_prob = log_prob(step.next_sample, Transition(step.mean, step.std, 0.0, kept))


def _clone_call(
    name: str, args: Any, kwargs: Any, clones: dict[tuple[int, int], tuple[Any, Any]], keep_graph: bool
) -> RawCall:
    origin: dict[str, tuple[int, int]] = {}

    def clone(path: str, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            key = origin[path] = (id(leaf), leaf._version)
            if key not in clones:
                clones[key] = (leaf, (leaf if keep_graph else leaf.detach()).clone())
            return clones[key][1]
        if isinstance(leaf, _PLAIN):
            return leaf
        if isinstance(leaf, np.ndarray):
            return leaf.copy()
        raise UnsupportedPolicyError(
            f"{name} is called with {path.split('.', 1)[-1]} of type {type(leaf).__name__}, "
            "which cannot be recorded and replayed"
        )

    tree = map_leaves(clone, {"args": tuple(args), "kwargs": dict(kwargs)})
    return RawCall(module=name, args=tree["args"], kwargs=tree["kwargs"], origin=origin)
