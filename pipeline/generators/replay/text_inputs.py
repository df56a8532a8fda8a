"""Trained text encoders: the learner computes a recorded rollout's text inputs again, with gradients.

The pipeline's own `__call__` runs on the recorded prompts, without its `no_grad` and with stand-ins for the denoisers,
up to the last trained step. The denoiser inputs it produces depend on the text encoders' weights through everything the
pipeline does (layers picked, encoders joined, negative prompts stacked); replay uses them in place of the recorded
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from pipeline.config.schema import GeneratorConfig
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.tensors import unpack
from pipeline.core.types import CallInputs, PromptItem, SamplingSpec
from pipeline.generators.call.arguments import CallMode, call_arguments
from pipeline.generators.load.pipeline import denoisers_of, text_encoders_of
from pipeline.generators.record.first_order import first_order_scheduler
from pipeline.generators.record.inputs import TOLERANCE, denoiser_inputs, relative_difference
from pipeline.generators.record.recorder import PipelineRecorder
from pipeline.generators.record.recording import RawStep, RecordOptions
from pipeline.generators.record.stand_ins import StandIns, undecorated_call, undecorated_methods
from pipeline.generators.replay.reencoded import ReencodedInputs, TextInputs
from pipeline.generators.replay.replayer import Replayer
from pipeline.generators.spec import StepInputKey

_INSTEAD = "use trainable.modules: denoiser"


class TextReencoder:
    """Runs a pipeline from prompts to denoiser inputs. Replaces its scheduler by the first-order one."""

    def __init__(self, pipe: Any, cfg: GeneratorConfig) -> None:
        self.pipe, self.cfg = pipe, cfg
        self.name = type(pipe).__name__
        self.denoisers = denoisers_of(pipe)
        self.prediction = first_order_scheduler(pipe)
        self._stand_ins = StandIns()

    def override_text(self, replayer: Replayer, sampling: SamplingSpec) -> ReencodedInputs:
        """Gives a replayer new text inputs with gradients. Raises UnsupportedPolicyError where none has a gradient."""
        call_inputs = replayer.part.call_inputs
        if call_inputs is None:
            raise UnsupportedPolicyError("this trajectory was recorded without its prompts; the text cannot be trained")
        samples = {step.index: unpack(step.sample, replayer.device) for step in replayer.part.steps}

        def reencode(gradients: bool) -> TextInputs:
            steps = self._run(call_inputs, sampling, samples, gradients)
            inputs = {key: leaf for key, leaf in denoiser_inputs(steps) if leaf.requires_grad or not gradients}
            return {key: _like_recorded(replayer, key, leaf) for key, leaf in inputs.items()}

        inputs = reencode(True)
        if not inputs:
            raise UnsupportedPolicyError(f"{self.name}: {_no_gradients()}")
        replayer.reencoded = ReencodedInputs(inputs, lambda: reencode(False))
        replayer.overrides = replayer.reencoded.tensors
        return replayer.reencoded

    def check(self, steps: list[RawStep], call_inputs: CallInputs, sampling: SamplingSpec) -> list[str]:
        """Compares new text inputs with recorded ones (before any weights are attached, so that both are equal).

        Returns the paths of the inputs that depend on the text encoders. Raises UnsupportedPolicyError where one
        comes out differently, or depends on them without a gradient.
        """
        recorded = dict(denoiser_inputs(steps))
        samples = {step.index: step.sample for step in steps}
        with self._changed_embeddings(lambda output: output.detach().requires_grad_()):
            inputs = dict(denoiser_inputs(self._run(call_inputs, sampling, samples, gradients=True)))
        with self._changed_embeddings(lambda output: output * 1.05):
            shifted = dict(denoiser_inputs(self._run(call_inputs, sampling, samples, gradients=False)))
        if inputs.keys() != recorded.keys():
            key = min(inputs.keys() ^ recorded.keys())
            raise UnsupportedPolicyError(
                f"{self.name}: replayed without its denoiser it makes different calls ({key.input})"
            )
        trained = {key for key, leaf in inputs.items() if leaf.requires_grad}
        if not trained:
            raise UnsupportedPolicyError(f"{self.name}: {_no_gradients()}")
        for key in trained:
            error = relative_difference(inputs[key].detach(), recorded[key])
            if not error <= TOLERANCE:
                raise UnsupportedPolicyError(
                    f"{self.name}: {_path(key)} comes out differently when its prompts are encoded again ({error:.1e}, "
                    f"allowed {TOLERANCE:.0e}); {_INSTEAD}"
                )
        floating = {key for key, leaf in recorded.items() if leaf.dtype.is_floating_point}
        for key in sorted(floating - trained):
            if relative_difference(shifted[key], inputs[key].detach()) > TOLERANCE:
                raise UnsupportedPolicyError(
                    f"{self.name}: {_path(key)} depends on the text encoders, but no gradient comes through; {_INSTEAD}"
                )
        return sorted({_path(key) for key in trained})

    def _run(
        self, call_inputs: CallInputs, sampling: SamplingSpec, samples: Mapping[int, torch.Tensor], gradients: bool
    ) -> list[RawStep]:
        """The denoiser calls of the steps in `samples`, their inputs differentiable where `gradients` is set.

        `samples`: step -> the recorded sample. It is used again, so that what a ControlNet computes from it is equal.
        """
        mode = CallMode(**call_inputs.mode)
        noiseless = replace(sampling, kind="ode", noise_level=0.0, stochastic_steps=(), trained_steps=())
        kwargs = call_arguments(self.pipe, self.cfg, call_inputs.prompts, noiseless, mode, call_inputs.placeholders)
        noise = [torch.Generator().manual_seed(seed % 2**63) for seed in call_inputs.seeds]
        kwargs["generator"] = noise if mode.batched else noise[0]
        recorder = PipelineRecorder(
            self.pipe,
            self.denoisers,
            self.prediction,
            noiseless,
            [torch.Generator() for _ in call_inputs.prompts],
            RecordOptions(keep_steps=frozenset(samples), samples=samples, stop_early=True, keep_graph=True),
        )
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
            stack.enter_context(undecorated_methods(self.pipe))
            stack.enter_context(self._stand_ins.in_place_of(self.denoisers))
            recording = stack.enter_context(recorder)
            undecorated_call(self.pipe, **kwargs)
        return recording.steps

    @contextmanager
    def _changed_embeddings(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Applies `change` to the output of every token embedding of the text encoders."""
        layers = [
            layer
            for encoder in text_encoders_of(self.pipe).values()
            for layer in encoder.modules()
            if isinstance(layer, torch.nn.Embedding)
        ]
        hooks = [layer.register_forward_hook(lambda _module, _args, output: change(output)) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def to_call_inputs(
    prompts: Sequence[PromptItem], seeds: Sequence[int], mode: CallMode, placeholders: Sequence[str]
) -> CallInputs:
    """A pipeline call's inputs as they travel with a trajectory."""
    return CallInputs(prompts=tuple(prompts), seeds=tuple(seeds), mode=mode.to_dict(), placeholders=tuple(placeholders))


def reference_inputs(replayer: Replayer) -> AbstractContextManager[None]:
    """A context in which a replayer uses the starting policy's text. Enter it with the adapters off."""
    reencoded = replayer.reencoded
    return nullcontext() if reencoded is None else _with_reference(replayer, reencoded)


@contextmanager
def _with_reference(replayer: Replayer, reencoded: ReencodedInputs) -> Iterator[None]:
    replayer.overrides = reencoded.reference()
    try:
        yield
    finally:
        replayer.overrides = reencoded.tensors


def _like_recorded(replayer: Replayer, key: StepInputKey, leaf: torch.Tensor) -> torch.Tensor:
    """In the recorded input's dtype: under autocast the learner's denoiser may have another one."""
    recorded = replayer.recorded(key)
    return leaf if recorded is None else leaf.to(recorded.dtype)


def _path(key: StepInputKey) -> str:
    return key.input.path.removeprefix("kwargs.")


def _no_gradients() -> str:
    return f"no denoiser input carries a gradient of the text encoders; it encodes prompts in its own way; {_INSTEAD}"
