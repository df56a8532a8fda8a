"""What one recorded pipeline call leaves behind: its kept scheduler steps and the denoiser calls that led to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.tensors import CallOutput, map_leaves
from pipeline.core.types import StepGuidance

if TYPE_CHECKING:
    from pipeline.generators.record.shared_prefix import SharedPrefix
    from pipeline.rl.samplers.base import NoiseLevels

_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device, np.generic, slice)


@dataclass(frozen=True, slots=True)
class TensorId:
    """A tensor as it was at one moment. Unique while the tensor is alive."""

    address: int  # id() of the tensor
    version: int  # counts its in-place changes


@dataclass(slots=True)
class RawCall:
    """One denoiser call: trees of cloned tensors, and the identity of each original."""

    module: str
    args: Any
    kwargs: Any
    origin: dict[str, TensorId]  # leaf path -> the original tensor
    output: torch.Tensor | None = None
    processors: dict[str, str] = field(default_factory=dict)  # see record.attention
    before: list[RawCall] = field(default_factory=list)  # calls of other modules, whose outputs this one is given

    @property
    def inputs(self) -> dict[str, Any]:
        """The tree whose leaf paths `spec.InputKey` names."""
        tree: dict[str, Any] = {"args": self.args, "kwargs": self.kwargs}
        return {**tree, "before": [call.inputs for call in self.before]} if self.before else tree

    def link(self, produced: Mapping[TensorId, tuple[RawCall, str]]) -> None:
        """Puts `CallOutput` in place of inputs that another call has made. `produced`: its tensors -> that call, and
        the leaf of its output."""
        found = {path: produced[key] for path, key in self.origin.items() if key in produced}
        self.before = list({id(call): call for call, _ in found.values()}.values())
        places = {id(call): number for number, call in enumerate(self.before)}

        def linked(path: str, leaf: Any) -> Any:
            if path not in found:
                return leaf
            call, output = found[path]
            del self.origin[path]
            return CallOutput(places[id(call)], output)

        tree = map_leaves(linked, {"args": self.args, "kwargs": self.kwargs})
        self.args, self.kwargs = tree["args"], tree["kwargs"]
        for number, call in enumerate(self.before):
            self.origin |= {f"before[{number}].{path}": key for path, key in call.origin.items()}

    @property
    def first_output(self) -> torch.Tensor:
        """The output. Raises RuntimeError once it has been dropped."""
        if self.output is None:
            raise RuntimeError(f"the output of this {self.module} call is not recorded")
        return self.output


@dataclass(slots=True)
class RawStep:
    """One scheduler step. Tensors [B, ...], B takes, in the pipeline's dtype unless said otherwise; frames that a
    pipeline folds into the batch are unfolded into axis 1."""

    index: int
    sigma: float
    sigma_next: float
    sigma_cap: float
    guidance: StepGuidance  # the pipeline's nominal scale, until it is fitted
    sample: torch.Tensor
    model_output: torch.Tensor
    next_sample: torch.Tensor
    mean: torch.Tensor  # float32
    log_prob: torch.Tensor | None  # float32 [B]; None where the step is deterministic
    calls: list[RawCall]
    num_steps: int = 0  # of the sampler's grid
    std: float = 0.0
    sharpness: float | None = None  # see samplers.base.Transition
    mask: torch.Tensor | None = None  # bool, like next_sample; None: the policy chose every value

    @property
    def outputs(self) -> list[torch.Tensor]:
        """The denoiser outputs, in the order of the calls."""
        return [call.first_output for call in self.calls]


@dataclass(frozen=True, slots=True)
class ReachedStep:
    """Where a call was ended: a sampler step whose model output is known, and which has not been taken."""

    sample: torch.Tensor  # [B, ...] x_t
    output: torch.Tensor  # [B, ...], guided, with the sign of a sigma that falls


@dataclass(slots=True)
class Recording:
    """The record of one pipeline call."""

    steps: list[RawStep] = field(default_factory=list)  # those in RecordOptions.keep_steps
    # (original, its clone); keeping the original alive keeps its id unique
    clones: dict[TensorId, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    levels: tuple[NoiseLevels, ...] = ()  # of all steps of the call, known from the first one on
    num_steps: int = 0  # scheduler steps taken so far
    denoise_started: float = 0.0  # time.perf_counter()
    denoise_ended: float = 0.0
    final: torch.Tensor | None = None  # [B, ...], the last step's result
    chosen_share: float = 1.0  # smallest share of the latent values that the policy chose, over the steps
    stopped: bool = False  # ended early, so the pipeline returned nothing
    reached: ReachedStep | None = None  # where RecordOptions.stop_at ended the call


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordOptions:
    """What a recorder keeps of a pipeline call, and what it changes while the call runs."""

    keep_steps: frozenset[int] = frozenset()  # steps whose denoiser inputs are kept
    # Sees each kept step with its outputs and may fill in the guidance; the outputs are then dropped.
    on_step: Callable[[RawStep], None] | None = None
    # (step, module name, output) -> the output that the pipeline receives instead
    replace_output: Callable[[int, str, torch.Tensor], torch.Tensor] | None = None
    stop_early: bool = False  # end the call once the kept steps are complete; with none kept, before the first step
    keep_graph: bool = False  # recorded inputs stay differentiable
    samples: Mapping[int, torch.Tensor] = field(default_factory=dict)  # step -> the sample it starts from instead
    outputs: Mapping[int, torch.Tensor] = field(default_factory=dict)  # step -> model output of a `ReachedStep`
    stop_at: int | None = None  # end the call at this step, before it is taken, with its model output
    check_first: bool = False  # compare the first step, without noise, with the scheduler's own
    # step -> take -> the source of its noise from this step on, in place of the one before
    forks: Mapping[int, Mapping[int, torch.Generator]] = field(default_factory=dict)
    shared_prefix: SharedPrefix | None = None  # takes that are computed once while they are equal


def clone_call(
    name: str, args: Any, kwargs: Any, clones: dict[TensorId, tuple[torch.Tensor, torch.Tensor]], keep_graph: bool
) -> RawCall:
    """Copies the inputs of a call to module `name`, each original once: some pipelines edit them in place later.

    Raises UnsupportedPolicyError where an input is of a type that cannot be replayed.
    """
    origin: dict[str, TensorId] = {}

    def clone(path: str, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            key = origin[path] = TensorId(id(leaf), leaf._version)
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
