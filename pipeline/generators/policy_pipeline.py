"""A loaded diffusers pipeline, prepared so that its calls draw policy noise and can be recorded.

Both the probe and the policy call the pipeline through this class. It knows nothing of what the probe learns.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.config.schema import Config, GeneratorConfig
from pipeline.core.errors import CannotRun, UnsupportedPolicyError
from pipeline.core.types import Lineage, PromptItem, SamplingSpec
from pipeline.generators.call.arguments import CallMode, call_arguments
from pipeline.generators.call.output import to_floats
from pipeline.generators.call.quirks import quirk_for
from pipeline.generators.call.signature import parameters_of
from pipeline.generators.load.embedding_cache import EmbeddingStore
from pipeline.generators.load.offload import Offload
from pipeline.generators.load.pipeline import denoisers_of, load_pipeline
from pipeline.generators.load.prompt_cache import cache_prompts
from pipeline.generators.record.first_order import first_order_scheduler, kinds_for
from pipeline.generators.record.recorder import PipelineRecorder
from pipeline.generators.record.recording import Recording, RecordOptions
from pipeline.generators.record.stand_ins import StandIns, undecorated_call, undecorated_methods
from pipeline.generators.replay.text_inputs import TextReencoder

log = logging.getLogger("rushes.generators")
TAIL_STEPS = 3  # sampler steps of a call that is run for its tail; as many as a probe's, whose request is known
_POLICY_NOISE = 0x5DEECE66D  # separates the policy's noise stream from the initial noise of the same seed


@dataclass(frozen=True, slots=True)
class CallPlan:
    """How the pipeline is called."""

    mode: CallMode = CallMode()
    placeholders: tuple[str, ...] = ()  # conditions that are made up where a prompt lacks them
    # Sampler steps -> num_inference_steps, where a pipeline rounds steps x strength differently; grows as they are met.
    steps_to_request: dict[int, int] = field(default_factory=dict)


class Sampled(NamedTuple):
    """The result of one pipeline call."""

    values: np.ndarray  # float32 [K, F, H, W, 3] in [0, 1]; empty where the call was ended early
    recording: Recording


class PolicyPipeline:
    """See the module docstring. Not thread-safe: one call at a time."""

    def __init__(self, cfg: Config, pipe: Any, device: torch.device) -> None:
        """Replaces the pipeline's scheduler by the first-order one. Raises UnsupportedPolicyError where the class or
        the sampler cannot be used."""
        self.cfg, self.pipe, self.device = cfg, pipe, device
        self.name = type(pipe).__name__
        quirk = quirk_for(pipe)
        if quirk.refuse:
            raise UnsupportedPolicyError(f"{self.name}: {quirk.refuse}")
        if quirk.prepare is not None:
            quirk.prepare(pipe)
        self.denoisers = denoisers_of(pipe)
        self.prediction = first_order_scheduler(pipe)
        kinds = kinds_for(pipe.scheduler, self.prediction)
        if cfg.sampler.kind not in kinds:
            raise UnsupportedPolicyError(
                f"sampler.kind: {cfg.sampler.kind} does not fit {self.name}, which predicts {self.prediction} "
                f"({type(pipe.scheduler).__name__}); use {' or '.join(kinds)}"
            )
        self.text = TextReencoder(pipe, cfg.generator) if cfg.trainable.trains_text else None
        self.scales = self._named_scales()
        self.stand_ins = StandIns()
        self.embeddings: EmbeddingStore | None = None
        self.offload: Offload | None = None
        cache_prompts(pipe)

    @classmethod
    def load(cls, cfg: Config, device: torch.device) -> PolicyPipeline:
        """Loads the checkpoint named in the config, with embedding cache and offloading as configured."""
        generator = cfg.generator
        store = EmbeddingStore(generator, device) if generator.embedding_cache is not None else None
        skip = store.skippable() if store is not None else []
        offloaded = generator.offload != "none" and device.type != "cpu"  # else there is nothing to offload from
        pipe = load_pipeline(generator, device, skip, place=not offloaded)
        if store is not None:
            store.install(pipe)
        pipeline = cls(cfg, pipe, device)
        pipeline.embeddings = store
        if offloaded:
            pipeline.offload = Offload(generator.offload, pipe, pipeline.denoisers, device)
            if store is not None:
                store.on_loaded = pipeline.offload.adopt
        return pipeline

    def _named_scales(self) -> tuple[float, ...]:
        """Numbers in the pipeline call's own arguments that may be a guidance scale or a rescale factor."""
        arguments = {name: parameter.default for name, parameter in parameters_of(self.pipe).items()}
        scales = [self.cfg.generator.guidance_scale]
        for name, value in {**arguments, **self.cfg.generator.call_kwargs}.items():
            is_scale = any(word in name for word in ("guidance", "cfg", "scale"))
            if is_scale and isinstance(value, (int, float)) and not isinstance(value, bool):
                scales.append(float(value))
        return tuple(dict.fromkeys([*scales, 1.0]))

    @torch.no_grad()
    def sample(
        self,
        plan: CallPlan,
        prompts: Sequence[PromptItem],
        seeds: Sequence[int],
        noise_seeds: Sequence[int] | None,
        sampling: SamplingSpec,
        options: RecordOptions,
        denoise_from: int = 0,
    ) -> Sampled:
        """One pipeline call. `seeds`: of the policy's noise, and of the initial noise unless `noise_seeds` are given.

        `denoise_from`: the sampler step from which on the denoisers are called; stand-ins take their place before.
        Raises UnsupportedPolicyError when the pipeline takes another number of steps than `sampling` names, or makes
        other frames than the config asks for.
        """
        kwargs = self.call_arguments(plan, prompts, sampling)
        initial = [cpu_generator(seed) for seed in noise_seeds or seeds]
        kwargs["generator"] = initial if plan.mode.batched else initial[0]
        noise = [cpu_generator(seed ^ _POLICY_NOISE) for seed in seeds]
        output = None
        recorder = PipelineRecorder(self.pipe, self.denoisers, self.prediction, sampling, noise, options)
        with ExitStack() as stack:
            if denoise_from > 0:
                early = partial(_before, recorder.recording, denoise_from)
                stack.enter_context(self.stand_ins.in_place_of(self.denoisers, active=early))
            recording = stack.enter_context(recorder)
            output = self.pipe(**kwargs)
        if recording.stopped:
            return Sampled(np.zeros(0, np.float32), recording)
        if recording.num_steps != sampling.num_steps:
            if self._request_other_steps(plan, kwargs.get("num_inference_steps", 0), recording.num_steps, sampling):
                return self.sample(plan, prompts, seeds, noise_seeds, sampling, options, denoise_from)
            raise UnsupportedPolicyError(_wrong_steps(self.name, recording.num_steps, sampling.num_steps))
        values = to_floats(output, len(prompts))
        check_made(self.pipe, self.cfg.generator, values)
        return Sampled(values, recording)

    def run_tail(
        self,
        plan: CallPlan,
        x0: torch.Tensor,
        prompts: Sequence[PromptItem],
        seeds: Sequence[int],
        output_type: str,
    ) -> Any:
        """The pipeline's output for x0 [K, ...] as the result of its last step; gradients as grad mode says."""
        steps = TAIL_STEPS
        sampling = SamplingSpec(
            kind="ode",
            noise_level=0.0,
            num_steps=steps,
            stochastic_steps=(),
            trained_steps=(),
            guidance_scale=self.cfg.generator.guidance_scale,
        )
        kwargs = self.call_arguments(plan, prompts, sampling)
        initial = [cpu_generator(seed) for seed in seeds]
        kwargs.update(generator=initial if plan.mode.batched else initial[0], output_type=output_type)
        options = RecordOptions(samples={steps: x0})
        noise = [cpu_generator(seed) for seed in seeds]
        with ExitStack() as stack:
            if torch.is_grad_enabled():  # else the pipeline as it is, with its cached prompts
                stack.enter_context(undecorated_methods(self.pipe))
            stack.enter_context(self.stand_ins.in_place_of(self.denoisers))
            stack.enter_context(PipelineRecorder(self.pipe, self.denoisers, self.prediction, sampling, noise, options))
            return undecorated_call(self.pipe, **kwargs) if torch.is_grad_enabled() else self.pipe(**kwargs)

    def call_arguments(self, plan: CallPlan, prompts: Sequence[PromptItem], sampling: SamplingSpec) -> dict[str, Any]:
        """Arguments of the pipeline's __call__, without `generator`."""
        kwargs = call_arguments(self.pipe, self.cfg.generator, prompts, sampling, plan.mode, plan.placeholders)
        if sampling.num_steps in plan.steps_to_request:
            kwargs["num_inference_steps"] = plan.steps_to_request[sampling.num_steps]
        return kwargs

    def _request_other_steps(self, plan: CallPlan, requested: int, taken: int, sampling: SamplingSpec) -> bool:
        """Whether another num_inference_steps may give the right number of steps; noted in `plan` if so."""
        steps = sampling.num_steps
        if not 0 < taken <= requested or "strength" not in parameters_of(self.pipe) or steps in plan.steps_to_request:
            return False
        plan.steps_to_request[steps] = requested + steps - taken
        return True


def check_made(pipe: Any, generator: GeneratorConfig, values: np.ndarray) -> None:
    """Compares values [K, F, H, W, 3] with what the config asks for. Raises `CannotRun` for fewer frames or another
    size: some pipelines round them, or know no frames. An upscaler is not asked for a size; a pipeline that makes whole
    sections may make more frames, which is logged.
    """
    name, arguments = type(pipe).__name__, parameters_of(pipe)
    frames, height, width = values.shape[1:4]
    made = {"num_frames": frames, "height": height, "width": width}
    settings = [
        f"generator.{key}={value}"
        for key, value in made.items()
        if (value < generator.num_frames if key == "num_frames" else key in arguments)
        and value != getattr(generator, key)
    ]
    text = (
        f"{name} made {_frames_of(frames, height, width)} where "
        f"{_frames_of(generator.num_frames, generator.height, generator.width)} were asked for"
    )
    if settings:
        raise CannotRun(f"{text}; set {', '.join(settings)}, which it can make")
    if frames > generator.num_frames:
        _say_once(text)


def _frames_of(frames: int, height: int, width: int) -> str:
    return f"{frames} frame{'s' if frames != 1 else ''} of {width}x{height}"


@functools.cache
def _say_once(text: str) -> None:
    log.warning("%s; all of them are scored and trained", text)


def _before(recording: Recording, step: int) -> bool:
    return recording.num_steps < step


def _wrong_steps(name: str, taken: int, expected: int) -> str:
    """Why a run of `taken` steps cannot be used for one of `expected`, and what to do."""
    if taken == 0:
        return (
            f"{name} took none of its steps through pipe.scheduler: it drives copies of it, one per frame or modality, "
            "and such a chain of steps has no log-prob here"
        )
    cause = "a model distilled to a fixed number of steps"
    if taken > expected:
        cause += (
            ", or one that takes a step per view, stage or segment of a clip (generator.call_kwargs may set how many)"
        )
    return (
        f"{name} took {taken} scheduler steps where {expected} were asked for: {cause}. A policy needs steps to draw "
        "noise at: use a checkpoint that takes as many as it is asked for, two or more"
    )


def cpu_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed % 2**63)


def fork_generators(forks: Sequence[Lineage]) -> dict[int, dict[int, torch.Generator]]:
    """Step -> take -> the source of its policy noise from there on."""
    sources: dict[int, dict[int, torch.Generator]] = {}
    for take, lineage in enumerate(forks):
        for step, seed in lineage:
            sources.setdefault(step, {})[take] = cpu_generator(seed ^ _POLICY_NOISE)
    return sources
