"""Runs a diffusers pipeline unchanged while policy steps replace its scheduler's and its denoiser calls are recorded.

The pipeline keeps its own loop, guidance, conditions and decoding. For one call, `scheduler.step` is replaced (it draws
from `pipeline.rl.samplers` with each take's own generator), and hooks on the denoisers copy what they are called with.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType, TracebackType
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.tensors import map_leaves
from pipeline.core.types import SamplingSpec, StepGuidance
from pipeline.generators.load.pipeline import controlnets_of
from pipeline.generators.noising import clean_prediction
from pipeline.generators.record.attention import changed_processors, processors_of, restore_processors
from pipeline.generators.record.first_order import StepTimes, is_consistency, levels_from, step_times
from pipeline.generators.record.outputs import first_tensor, has_one_tensor, replace_first
from pipeline.generators.record.policy_step import check_first_step, infer_mask, policy_transition
from pipeline.generators.record.recording import (
    RawCall,
    RawStep,
    ReachedStep,
    Recording,
    RecordOptions,
    TensorId,
    clone_call,
)
from pipeline.rl.samplers import Transition, log_prob


class StopRecording(Exception):
    """Ends a pipeline call once its kept steps are complete, before the VAE decodes."""


@dataclass(frozen=True, slots=True)
class _WholeInputs:
    """The inputs of a call of which the denoiser was given only the distinct takes."""

    args: Any
    kwargs: Any


class PipelineRecorder:
    """A context manager around one pipeline call; yields the growing `Recording`.

    `generators`: one CPU generator per take for the policy's noise, so a take does not depend on its batch.
    """

    def __init__(
        self,
        pipe: Any,
        denoisers: dict[str, torch.nn.Module],
        prediction: str,
        sampling: SamplingSpec,
        generators: Sequence[torch.Generator],
        options: RecordOptions,
    ) -> None:
        self.pipe, self.scheduler, self.denoisers = pipe, pipe.scheduler, denoisers
        self.prediction, self.sampling, self.options = prediction, sampling, options
        self.generators = list(generators)
        self.takes = len(generators)
        self.name = type(pipe).__name__
        self.recording = Recording()
        self._calls: list[RawCall] = []  # of the step that is being denoised
        self._whole_inputs: list[_WholeInputs | None] = []  # per call of that step; None: it was given all takes
        self._last_step: RawStep | None = None  # kept; its mask shows only in the next step's sample
        self._processors: dict[str, dict[str, Any]] = {}
        self._hooks: list[Any] = []
        self._produced: dict[TensorId, tuple[RawCall, str]] = {}  # by ControlNets in this step: their call, the leaf
        self._alive: list[torch.Tensor] = []  # these tensors, so that their ids stay unique
        self._fed = False  # whether ControlNets run: their residuals are of all takes, also where some are equal

    def __enter__(self) -> Recording:
        for name, module in self.denoisers.items():
            self._processors[name] = processors_of(module)
            self._hooks.append(module.register_forward_pre_hook(partial(self.on_denoiser_call, name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(partial(self.on_denoiser_output, name), with_kwargs=True))
        for name, module in controlnets_of(self.pipe).items():
            self._hooks.append(module.register_forward_hook(partial(self.on_controlnet_output, name), with_kwargs=True))
        self.scheduler.step = _PolicyStep(self.scheduler, self.scheduler_step)
        return self.recording

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for name, processors in self._processors.items():  # a stopped pipeline has not restored them itself
            restore_processors(self.denoisers[name], processors)
        self.scheduler.__dict__.pop("step", None)  # the class's own method shows again
        for hook in self._hooks:
            hook.remove()
        return isinstance(error, StopRecording)

    # -- events ---------------------------------------------------------------------------------------------------

    def on_denoiser_call(self, name: str, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Before a denoiser runs: records its inputs; returns those of the distinct takes where that is enough."""
        step, prefix = self.recording.num_steps, self.options.shared_prefix
        if not self.recording.denoise_started:
            self.recording.denoise_started = time.perf_counter()
        if step in self.options.keep_steps:
            call = clone_call(name, args, kwargs, self.recording.clones, self.options.keep_graph)
            call.processors = changed_processors(module, self._processors[name])
            call.link(self._produced)
            self._calls.append(call)
        distinct = None
        if prefix is not None and not self._fed:
            distinct = prefix.distinct_inputs(step, len(self._whole_inputs), args, kwargs)
        self._whole_inputs.append(None if distinct is None else _WholeInputs(args, kwargs))
        return distinct

    def on_controlnet_output(self, name: str, _module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After a ControlNet has run: its call is recorded with those of the denoisers that are given its output."""
        self._fed = True
        if self.recording.num_steps not in self.options.keep_steps:
            return
        call = clone_call(name, args, kwargs, self.recording.clones, self.options.keep_graph)

        def produced(path: str, leaf: Any) -> None:
            if isinstance(leaf, torch.Tensor):
                self._produced[TensorId(id(leaf), leaf._version)] = (call, path)
                self._alive.append(leaf)

        map_leaves(produced, output)

    def on_denoiser_output(self, name: str, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After a denoiser has run: expands its output to all takes, replaces and records it as the options say."""
        step, prefix, whole = self.recording.num_steps, self.options.shared_prefix, self._whole_inputs[-1]
        if whole is not None and prefix is not None:
            if has_one_tensor(output):
                expanded = prefix.expand_output(step, len(self._whole_inputs) - 1, first_tensor(output))
                output = replace_first(output, expanded)
            else:  # where the takes are in the other outputs is not known
                prefix.active = False
                output = module.forward(*whole.args, **whole.kwargs)
        if self.options.replace_output is not None:
            output = replace_first(output, self.options.replace_output(step, name, first_tensor(output)))
        if step in self.options.keep_steps:
            self._calls[-1].output = first_tensor(output).detach().clone()
        return output

    def scheduler_step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any,
        return_dict: bool,
        **rest: Any,
    ) -> Any:
        """In place of `scheduler.step`: draws x_next, records the step, and returns what the scheduler would.

        Raises StopRecording, and UnsupportedPolicyError where the step cannot be a policy's.
        """
        step, recording, options = self.recording.num_steps, self.recording, self.options
        times, position = step_times(self.scheduler, self.prediction, step, timestep)
        x, out = self._policy_inputs(model_output, sample, times, reverse=rest.get("per_token_timesteps") is not None)
        if self._last_step is not None:
            infer_mask(self._last_step, x, recording, self.name)
            self._last_step = None
        if step == 0:
            recording.levels = levels_from(self.scheduler, self.prediction, position)
        if options.stop_early and step > max(options.keep_steps, default=-1):
            recording.stopped = True
            raise StopRecording
        out = options.outputs.get(step, out)
        if step == options.stop_at:
            recording.reached = ReachedStep(x.detach().clone(), out.detach().clone())
            recording.stopped = True
            raise StopRecording
        last = position + 1 >= len(self.scheduler.timesteps)
        draw = partial(policy_transition, self.scheduler, self.sampling, self.prediction, x, out, times)
        if options.check_first and step == 0:
            noiseless = draw(noisy=False, last=False, generator=generator).mean.reshape(sample.shape)
            arguments = {"model_output": model_output, "timestep": timestep, "sample": sample, **rest}
            check_first_step(self.scheduler, noiseless, arguments)
        for take, source in options.forks.get(step, {}).items():
            self.generators[take] = source
        noisy = step in self.sampling.stochastic_steps
        gaussian = draw(noisy=noisy, last=last, generator=generator)
        # Rounded to the pipeline's dtype before its log-prob is taken: replay sees exactly this tensor.
        next_sample = self._draw(gaussian, noisy).to(sample.dtype)
        if step in options.keep_steps:
            self._keep_step(times, x, out, gaussian, next_sample, noisy)
        self._calls.clear()
        self._whole_inputs.clear()
        self._produced.clear()
        self._alive.clear()
        recording.num_steps += 1
        recording.final = next_sample.detach()
        recording.denoise_ended = time.perf_counter()
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = position + 1
        if options.stop_early and last and step == max(options.keep_steps):
            recording.stopped = True
            raise StopRecording
        previous = next_sample.reshape(sample.shape)
        clean = next_sample  # of a last step whose result was given
        if not (last and step + 1 in options.samples):
            clean = clean_prediction(self.prediction, times.levels, x, out, is_consistency(self.scheduler))
        clean = clean.to(sample.dtype).reshape(sample.shape)
        if return_dict:
            return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=clean)
        return (previous,) if self.prediction == "flow" else (previous, clean)

    # -- parts of a step ------------------------------------------------------------------------------------------

    def _policy_inputs(
        self, model_output: torch.Tensor, sample: torch.Tensor, times: StepTimes, reverse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, model output), both [takes, ...] with the sign of a sigma that falls. `reverse`: FlowMatchEuler with
        per-token timesteps steps in the opposite direction (LTXCondition)."""
        out = -model_output if reverse else model_output
        if out.shape != sample.shape and out.shape[1] == 2 * sample.shape[1]:
            out = out[:, : sample.shape[1]]  # without the learned variance, which DDPM's step splits off
        if out.shape != sample.shape:
            raise UnsupportedPolicyError(
                f"{self.name} hands the scheduler {list(out.shape)} for a sample {list(sample.shape)}"
            )
        return self._unfold(sample), self._unfold(-out if times.flip else out)

    def _unfold(self, tensor: torch.Tensor) -> torch.Tensor:
        """[takes x frames, ...] -> [takes, frames, ...]"""
        if tensor.shape[0] == self.takes:
            return tensor
        if tensor.shape[0] % self.takes:
            raise UnsupportedPolicyError(
                f"{self.name} hands the scheduler {tensor.shape[0]} samples for {self.takes} takes"
            )
        return tensor.unflatten(0, (self.takes, tensor.shape[0] // self.takes))

    def _draw(self, gaussian: Transition, noisy: bool) -> torch.Tensor:
        """x_next, with each take's own noise."""
        replacement = self.options.samples.get(self.recording.num_steps + 1)
        next_sample = gaussian.mean
        if noisy:
            shape = gaussian.mean.shape[1:]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])
            next_sample = gaussian.mean + gaussian.std * noise.to(gaussian.mean.device)
        return next_sample if replacement is None else replacement.to(next_sample.device)

    def _keep_step(
        self,
        times: StepTimes,
        x: torch.Tensor,
        out: torch.Tensor,
        gaussian: Transition,
        next_sample: torch.Tensor,
        noisy: bool,
    ) -> None:
        nominal = _as_scale(getattr(self.pipe, "guidance_scale", None), self.sampling.guidance_scale)
        step = RawStep(
            index=self.recording.num_steps,
            num_steps=self.sampling.num_steps,
            sigma=times.sigma,
            sigma_next=times.sigma_next,
            sigma_cap=times.cap,
            guidance=StepGuidance(scale=nominal),
            sample=x.detach().clone(),
            model_output=out.detach().clone(),
            next_sample=next_sample.detach().clone(),
            mean=gaussian.mean,
            log_prob=log_prob(next_sample, gaussian) if noisy and gaussian.std > 0 else None,
            calls=list(self._calls),
            std=gaussian.std if noisy else 0.0,
            sharpness=gaussian.sharpness,
        )
        if self.options.on_step is not None:
            self.options.on_step(step)
            for call in step.calls:
                call.output = None
        self.recording.steps.append(step)
        self._last_step = step


class _PolicyStep:
    """Replaces `scheduler.step`. A copy of the scheduler (for a second modality) gets its class's own step back."""

    def __init__(self, scheduler: Any, policy_step: Callable[..., Any]) -> None:
        class_step = type(scheduler).step
        self._scheduler, self._class_step, self._policy_step = scheduler, class_step, policy_step
        parameters = list(inspect.signature(class_step).parameters.values())
        self.__signature__ = inspect.Signature(parameters[1:])  # pipelines look for eta and generator

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        accepted = self.__signature__.parameters  # the checkpoint's own scheduler may have accepted more
        kwargs = {name: value for name, value in kwargs.items() if name in accepted}
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        return self._policy_step(**{"generator": None, "return_dict": True, **arguments})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._scheduler))
        return self if copied is None else MethodType(self._class_step, copied)  # None: its __dict__ alone is copied


def _as_scale(value: Any, default: float) -> float:
    """A guidance scale as a float; `default` where the pipeline has none, or one per frame."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        return default
    try:
        return float(value)
    except (TypeError, ValueError):
        return default
