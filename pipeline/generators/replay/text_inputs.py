"""Trained text encoders: a recorded rollout's text inputs computed anew, differentiably, in the learner.

The pipeline's own `__call__` runs again on the recorded prompts, without its `no_grad` and with stand-ins for the
denoisers, up to the last trained step. What the denoisers are given there still hangs on the text encoders' weights,
whatever the pipeline did in between (layers picked, encoders joined, negative prompts stacked); replay puts it in place
of the recorded inputs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from types import FunctionType, MethodType
from typing import Any

import torch

from pipeline.config.schema import GeneratorConfig
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.tensors import map_leaves, unpack
from pipeline.core.types import CallInputs, SamplingSpec
from pipeline.generators.call.arguments import CallMode, call_arguments
from pipeline.generators.load.pipeline import denoisers_of, text_encoders_of
from pipeline.generators.record.first_order import first_order_scheduler
from pipeline.generators.record.recorder import RawStep, record
from pipeline.generators.replay.replayer import Replayer

Key = tuple[int, str]  # (sampler step, "<calls>.<call>:<path>"), as in Replayer.overrides
_INSTEAD = "use trainable.modules: denoiser"
_TOLERANCE = 1e-5  # relative; the same code on the same prompts comes out equal


class ReencodedInputs:
    """Text inputs of one trajectory part: leaves for the replay, and what they came from.

    Many micro-batches put gradients into the leaves; `backward` sends them through the text encoders once.
    """

    def __init__(self, made: dict[Key, torch.Tensor], again: Callable[[], dict[Key, torch.Tensor]]) -> None:
        self._again = again
        self._reference: dict[Key, torch.Tensor] | None = None
        self._roots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # one leaf for an input met at several steps
        self.tensors: dict[Key, torch.Tensor] = {}
        for key, root in made.items():
            if id(root) not in self._roots:
                self._roots[id(root)] = (root, root.detach().requires_grad_())
            self.tensors[key] = self._roots[id(root)][1]

    def backward(self) -> None:
        """Adds the encoders' gradients; call once, after the last replay."""
        pairs = [(root, leaf.grad) for root, leaf in self._roots.values() if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [grad for _, grad in pairs])

    def reference(self) -> dict[Key, torch.Tensor]:
        """The same inputs of the starting policy. Call with the adapters off; computed once."""
        if self._reference is None:
            made = self._again()
            self._reference = {key: made[key] for key in self.tensors}
        return self._reference


class TextReencoder:
    """Runs a pipeline from prompts to denoiser inputs. Changes its scheduler's class as a `Policy` does."""

    def __init__(self, pipe: Any, cfg: GeneratorConfig) -> None:
        self.pipe, self.cfg = pipe, cfg
        self.name = type(pipe).__name__
        self.denoisers = denoisers_of(pipe)
        self.prediction = first_order_scheduler(pipe)
        self._outputs: dict[Any, Any] = {}

    def override_text(self, replayer: Replayer, sampling: SamplingSpec) -> ReencodedInputs:
        """Gives a replayer fresh text inputs with gradients. Raises UnsupportedPolicyError where none come through."""
        call_inputs = replayer.part.call_inputs
        if call_inputs is None:
            raise UnsupportedPolicyError("this trajectory was recorded without its prompts; the text cannot be trained")

        samples = {step.index: unpack(step.sample, replayer.device) for step in replayer.part.steps}

        def make(gradients: bool) -> dict[Key, torch.Tensor]:
            steps = self._run(call_inputs, sampling, samples, gradients)
            made = {key: leaf for key, leaf in inputs_of(steps) if leaf.requires_grad or not gradients}
            return {key: self._like_recorded(replayer, key, leaf) for key, leaf in made.items()}

        made = make(True)
        if not made:
            raise UnsupportedPolicyError(f"{self.name}: {_no_gradients()}")
        replayer.reencoded = ReencodedInputs(made, lambda: make(False))
        replayer.overrides = replayer.reencoded.tensors
        return replayer.reencoded

    def _like_recorded(self, replayer: Replayer, key: Key, leaf: torch.Tensor) -> torch.Tensor:
        """In the recorded input's dtype: under autocast the learner's denoiser may have another one."""
        recorded = replayer.recorded(*key)
        return leaf if recorded is None else leaf.to(recorded.dtype)

    def check(self, steps: list[RawStep], call_inputs: CallInputs, sampling: SamplingSpec) -> list[str]:
        """Compares fresh text inputs with recorded ones (before any weights are attached, so that both are equal).

        Returns the paths of the inputs that depend on the text encoders. Raises UnsupportedPolicyError where one
        comes out differently, or depends on them without a gradient.
        """
        recorded = dict(inputs_of(steps))
        samples = {step.index: step.sample for step in steps}
        with self._at_embeddings(lambda output: output.detach().requires_grad_()):
            made = dict(inputs_of(self._run(call_inputs, sampling, samples, gradients=True)))
        with self._at_embeddings(lambda output: output * 1.05):
            moved = dict(inputs_of(self._run(call_inputs, sampling, samples, gradients=False)))
        if made.keys() != recorded.keys():
            odd = sorted(made.keys() ^ recorded.keys())[0]
            raise UnsupportedPolicyError(f"{self.name}: replayed without its denoiser it makes other calls ({odd[1]})")
        trained = {key for key, leaf in made.items() if leaf.requires_grad}
        if not trained:
            raise UnsupportedPolicyError(f"{self.name}: {_no_gradients()}")
        for key in trained:
            gap = distance_between(made[key].detach(), recorded[key])
            if not gap <= _TOLERANCE:
                raise UnsupportedPolicyError(
                    f"{self.name}: {_path(key)} comes out differently when its prompts are encoded again ({gap:.1e}, "
                    f"allowed {_TOLERANCE:.0e}); {_INSTEAD}"
                )
        samples = {key for key, leaf in recorded.items() if leaf.dtype.is_floating_point}
        for key in sorted(samples - trained):
            if distance_between(moved[key], made[key].detach()) > _TOLERANCE:
                raise UnsupportedPolicyError(
                    f"{self.name}: {_path(key)} depends on the text encoders, but no gradient comes through; {_INSTEAD}"
                )
        return sorted({_path(key) for key in trained})

    def _run(
        self, call_inputs: CallInputs, sampling: SamplingSpec, samples: dict[int, torch.Tensor], gradients: bool
    ) -> list[RawStep]:
        """The denoiser calls of the steps in `samples` (step -> the recorded sample, which they get again, so that what
        a ControlNet makes of it comes out the same), their inputs differentiable where asked for."""
        mode = CallMode(**call_inputs.mode)
        quiet = replace(sampling, kind="ode", noise_level=0.0, stochastic_steps=(), trained_steps=())
        kwargs = call_arguments(self.pipe, self.cfg, call_inputs.prompts, quiet, mode, call_inputs.placeholders)
        noise = [torch.Generator().manual_seed(seed % 2**63) for seed in call_inputs.seeds]
        kwargs["generator"] = noise if mode.batched else noise[0]
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
            stack.enter_context(self._own_methods())
            stack.enter_context(self._stand_ins())
            recording = stack.enter_context(
                record(
                    self.pipe,
                    self.denoisers,
                    self.prediction,
                    quiet,
                    [torch.Generator() for _ in call_inputs.prompts],
                    keep_steps=set(samples),
                    samples=samples,
                    stop_early=True,
                    keep_graph=True,
                )
            )
            inspect.unwrap(type(self.pipe).__call__)(self.pipe, **kwargs)  # without its no_grad
        return recording.steps

    @contextmanager
    def _own_methods(self) -> Iterator[None]:
        """The class's own methods for the block, out of `no_grad` decorators and prompt caches."""
        cls, before = type(self.pipe), dict(self.pipe.__dict__)
        for name in dir(cls):
            if name.startswith("__"):
                continue
            method = inspect.getattr_static(cls, name)
            if isinstance(method, FunctionType) and (hasattr(method, "__wrapped__") or name in before):
                self.pipe.__dict__[name] = MethodType(inspect.unwrap(method), self.pipe)
        try:
            yield
        finally:
            for name in self.pipe.__dict__.keys() - before.keys():
                if isinstance(self.pipe.__dict__[name], MethodType):
                    del self.pipe.__dict__[name]
            self.pipe.__dict__.update({name: v for name, v in before.items() if callable(v)})

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        """Denoisers that answer at once, with what they gave when first asked for these shapes."""

        def standing_in(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(own)
            def forward(*args: Any, **kwargs: Any) -> Any:
                shapes: list[Any] = [name]
                map_leaves(lambda path, leaf: shapes.append((path, getattr(leaf, "shape", None))), [args, kwargs])
                key = repr(shapes)
                if key not in self._outputs:
                    with torch.no_grad():
                        self._outputs[key] = own(*args, **kwargs)
                return self._outputs[key]

            return forward

        before = {name: module.__dict__.get("forward") for name, module in self.denoisers.items()}
        for name, module in self.denoisers.items():
            module.__dict__["forward"] = standing_in(name, module.forward)
        try:
            yield
        finally:
            for name, module in self.denoisers.items():
                module.__dict__.pop("forward")
                if before[name] is not None:
                    module.__dict__["forward"] = before[name]

    @contextmanager
    def _at_embeddings(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Changes what every token embedding of the text encoders gives."""
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


def to_call_inputs(prompts: Any, seeds: Any, mode: CallMode, placeholders: list[str]) -> CallInputs:
    """A pipeline call's inputs as they travel with a trajectory."""
    return CallInputs(prompts=tuple(prompts), seeds=tuple(seeds), mode=asdict(mode), placeholders=tuple(placeholders))


def reference_inputs(replayer: Replayer) -> Any:
    """A context in which a replayer uses the starting policy's text. Enter it with the adapters off."""
    return nullcontext() if replayer.reencoded is None else _with_reference(replayer)


@contextmanager
def _with_reference(replayer: Replayer) -> Iterator[None]:
    replayer.overrides = replayer.reencoded.reference()
    try:
        yield
    finally:
        replayer.overrides = replayer.reencoded.tensors


def inputs_of(steps: list[RawStep]) -> Iterator[tuple[Key, torch.Tensor]]:
    """Every tensor that the denoisers are given."""
    for step in steps:
        for number, call in enumerate(step.calls):
            found: list[tuple[str, torch.Tensor]] = []

            def look(path: str, leaf: Any, found: list[tuple[str, torch.Tensor]] = found) -> None:
                if isinstance(leaf, torch.Tensor):
                    found.append((path, leaf))

            map_leaves(look, {"args": call.args, "kwargs": call.kwargs})
            for path, leaf in found:
                yield (step.index, f"{len(step.calls)}.{number}:{path}"), leaf


def same_inputs(one: list[RawStep], other: list[RawStep]) -> bool:
    """Whether the denoisers are given the same, to rounding."""
    a, b = dict(inputs_of(one)), dict(inputs_of(other))
    return a.keys() == b.keys() and all(distance_between(a[key], b[key]) <= _TOLERANCE for key in a)


def distance_between(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value; infinite where shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    a, b = a.float(), b.to(a.device).float()
    return float((a - b).abs().max()) / max(float(b.abs().max()), 1e-6)


def _path(key: Key) -> str:
    return key[1].split(":", 1)[1].removeprefix("kwargs.")


def _no_gradients() -> str:
    return f"no denoiser input carries a gradient of the text encoders; it encodes prompts in its own way; {_INSTEAD}"
