"""What a probe learns about a pipeline: everything that replay needs, as plain data that travels with a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pipeline.generators.guidance import OUTPUT_SLICES
from pipeline.generators.latent_map import LatentMap

LIST = -1  # Layout.axis of a list with one entry per take
Takes = slice | list[int]  # positions of takes in a batch


@dataclass(frozen=True, order=True, slots=True)
class CallKey:
    """A denoiser call within a sampler step. Steps that make a different number of calls are keyed apart, because a
    pipeline that drops a guidance branch at some steps calls its denoiser differently there."""

    calls: int  # how many denoiser calls the step makes
    number: int  # position of this call among them

    def __str__(self) -> str:
        return f"{self.calls}.{self.number}"


@dataclass(frozen=True, order=True, slots=True)
class InputKey:
    """One input of a denoiser call."""

    call: CallKey
    path: str  # of the leaf in {"args": ..., "kwargs": ...}, such as "kwargs.hidden_states"

    def __str__(self) -> str:
        return f"{self.call}:{self.path}"


@dataclass(frozen=True, order=True, slots=True)
class StepInputKey:
    """One input of a denoiser call at one sampler step."""

    step: int
    input: InputKey


def call_keys(calls: int) -> list[CallKey]:
    """The keys of a step that makes `calls` denoiser calls, in order."""
    return [CallKey(calls, number) for number in range(calls)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the takes are in a tensor: `axis` holds `copies` x B entries, ordered copy-major ("tile", as in a doubled
    guidance batch) or take-major ("repeat", as with frames folded into the batch). `inner` consecutive entries belong
    to one take of one copy (a doubled guidance batch of folded frames). Axis LIST: a list rather than a tensor."""

    axis: int
    copies: int
    order: str
    inner: int = 1

    def select(self, tensor: torch.Tensor, takes: Takes, total: int) -> torch.Tensor:
        """The entries of the takes in `takes` (of `total`), in the order given.

        Tiled copies are counted from the tensor itself, since a pipeline may drop a branch at some steps.
        """
        if self.order == "tile":
            copies = tensor.shape[self.axis] // (total * self.inner)
            split, take_axis = tensor.unflatten(self.axis, (copies, total, self.inner)), self.axis + 1
        else:
            split, take_axis = tensor.unflatten(self.axis, (total, self.copies)), self.axis
        index: list[Takes] = [slice(None)] * split.ndim
        index[take_axis] = takes
        selected = split[tuple(index)].flatten(self.axis, self.axis + (2 if self.order == "tile" else 1))
        return selected.contiguous()  # as recorded inputs are: some models call `view` on them

    def select_list(self, entries: list[Any] | tuple[Any, ...], takes: Takes, total: int) -> list[Any]:
        """As `select`, for a list with an entry per take and copy."""
        return [entries[i] for i in self.stacked.select(torch.arange(len(entries)), takes, total).tolist()]

    @property
    def stacked(self) -> Layout:
        """Itself; of a list, the layout of its entries when stacked."""
        return replace(self, axis=0) if self.axis == LIST else self

    def split(self, tensor: torch.Tensor, total: int) -> torch.Tensor:
        """The tensor of `total` takes -> tensors of single takes, each as `select` gives it, stacked [total, ...]."""
        axis = self.axis
        if self.order == "repeat":
            return tensor.unflatten(axis, (total, -1)).movedim(axis, 0)
        split = tensor.unflatten(axis, (-1, total, self.inner)).movedim(axis + 1, 0)  # [total, ..., copies, inner, ...]
        return split.flatten(axis + 1, axis + 2)

    def combine(self, takes: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`: single takes [b, ...] -> the tensor of the b takes."""
        axis = self.axis
        if self.order == "repeat":
            return takes.movedim(0, axis).flatten(axis, axis + 1).contiguous()
        split = takes.unflatten(axis + 1, (-1, self.inner))  # [b, ..., copies, inner, ...]
        return split.movedim(0, axis + 1).flatten(axis, axis + 2).contiguous()

    def branches(self, output: torch.Tensor, total: int) -> list[torch.Tensor]:
        """A denoiser output [copies x B x inner, ...] -> one [B, ...] (or [B, inner, ...]) per copy."""
        if self.order == "repeat":
            return [output.unflatten(0, (total, self.copies))] if self.copies > 1 else [output]
        split = output.unflatten(0, (-1, total, self.inner)) if self.inner > 1 else output.unflatten(0, (-1, total))
        return list(split.unbind(0))


@dataclass(frozen=True, slots=True)
class SampleSlots:
    """Where the values of a take's sample are in one input of a denoiser call, found by value when probing.

    `positions`: int32, shaped like one take's entries of the input (of a list: its tensors, stacked); a position in the
    take's flattened sample, -1 where the input holds something else.
    """

    positions: np.ndarray

    def fit(self, entries: torch.Tensor, layout: Layout | None, takes: int) -> bool:
        """Whether an input of that many takes has the shape that was traced."""
        return self.positions.shape == (entries if layout is None else layout.split(entries, takes)[0]).shape

    def fill(self, entries: torch.Tensor, sample: torch.Tensor, layout: Layout | None) -> torch.Tensor:
        """An input with the values of `sample` [b, ...] in place of the recorded sample's, its dtype kept.

        `entries`: the input of the b takes; returned as it is where it has another shape than was traced (see `fit`).
        `layout`: None where it holds the one take alone. Gradients go to `sample`.
        """
        if not self.fit(entries, layout, sample.shape[0]):
            return entries
        positions = torch.from_numpy(self.positions).to(sample.device)
        index = positions.flatten().long()
        takes = sample.flatten(1)[:, index.clamp(min=0)].reshape(-1, *positions.shape).to(entries.dtype)
        filled = takes[0] if layout is None else layout.combine(takes)
        if int(index.min()) >= 0:
            return filled
        chosen = (positions >= 0)[None].expand_as(takes)
        return torch.where(chosen[0] if layout is None else layout.combine(chosen), filled, entries)


Layouts = Mapping[InputKey, Layout]  # of the inputs that hold the takes; absent: the same for all takes


def map_call_inputs(
    tree: Any, layouts: Layouts, call: CallKey, takes: Takes | None, total: int, leaf: Callable[[str, Any], Any]
) -> Any:
    """Rebuilds the input tree of a denoiser call with leaves `leaf(path, leaf)`; lists with an entry per take are cut
    to `takes` (of `total`; None: all, where `layouts` is empty)."""

    def rebuild(node: Any, path: str) -> Any:
        if isinstance(node, dict):
            return {key: rebuild(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()}
        if not isinstance(node, (list, tuple)):
            return leaf(path, node)
        entries = [rebuild(value, f"{path}[{i}]") for i, value in enumerate(node)]
        layout = layouts.get(InputKey(call, path))
        if layout is not None and layout.axis == LIST and takes is not None:
            entries = layout.select_list(entries, takes, total)
        if isinstance(node, list):
            return entries
        return type(node)(*entries) if hasattr(node, "_fields") else tuple(entries)

    return rebuild(tree, "")


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySpec:
    """A pipeline as a policy."""

    pipeline: str  # class name
    prediction: str  # flow | epsilon | v_prediction | sample
    rules: dict[int, str]  # number of guidance branches in a step -> a key of guidance.RULES, or guidance.LINEAR_FIT
    sign: float  # -1: the pipeline hands the scheduler the negated value
    output_slice: str  # a key of guidance.OUTPUT_SLICES, or "gather"
    gather: np.ndarray | None  # int32 [...]: for each value the scheduler receives, its position in a branch's output
    layouts: dict[InputKey, Layout] | None  # see Layouts. None: unknown; a part is then replayed whole and cut after
    outputs: dict[CallKey, Layout]  # where takes and branches are in each call's output
    float_outputs: bool = False  # the pipeline makes outputs of 16 bits float32 before it combines them
    sample_slots: dict[InputKey, SampleSlots] = field(default_factory=dict)  # of the inputs that hold the sample
    sample_note: str = "not traced"  # why another sample cannot be put into the recorded inputs; "": it can
    pins_values: bool = False  # after a step the pipeline puts values of its own into the sample
    latents: LatentMap | None = None  # from the scheduler's sample to what the VAE decodes
    latents_note: str = "not traced"  # why there is none
    picture_note: str = "not traced"  # why the VAE's pictures of them are not the pipeline's; "": they are
    resume_note: str = "not tried"  # why a draw cannot go on from a given sample; "": it can
    consistency: bool = False  # the scheduler is LCM's: its steps jump to x0 and add noise again

    @property
    def any_sample(self) -> bool:
        """Whether the denoisers can be called with recorded inputs and another sample than the recorded one."""
        return not self.sample_note

    @property
    def why_no_decode(self) -> str:
        """Why the VAE alone does not make the pictures of a sample, in one line; "": it does."""
        if self.picture_note or self.latents is None:
            return self.picture_note or self.latents_note
        return "" if self.latents.whole else "the prompt's own pictures are part of what the VAE decodes"

    def why_no_reward_gradient(self, objective: str, moved_sample: bool) -> str:
        """Why an objective cannot learn through the pictures of finished takes, in one line; "" where it can.

        `moved_sample`: gradients go through the sample that the denoiser is given, too.
        """
        if self.why_no_decode:
            return (
                f"objective.name: {objective} needs pictures with gradients, and the VAE alone does not make those of "
                f"{self.pipeline}: {self.why_no_decode}; use an objective that is given finished scores, such as grpo"
            )
        if moved_sample and self.sample_note:
            return (
                f"objective.name: {objective} sends gradients through what the denoiser is given, which "
                f"{self.pipeline} does not allow: {self.sample_note}; train one step (objective.tail=1)"
            )
        return ""

    def why_not_noised_again(self, objective: str) -> str:
        """Why finished takes cannot be noised and denoised again by an objective, in one line; "" where they can."""
        if self.sample_note:
            reason = self.sample_note
        elif self.pins_values:
            reason = "the pipeline puts values of its own into the sample after a step"
        elif self.consistency:
            reason = "its scheduler draws noise of its own, so that takes without the policy's noise are not replayed"
        else:
            return ""
        return (
            f"objective.name: {objective} noises finished takes anew, which {self.pipeline} does not allow: "
            f"{reason}; use grpo"
        )

    def branches(self, outputs: list[torch.Tensor], shape: torch.Size) -> list[torch.Tensor]:
        """The denoiser outputs of one step -> a tensor per guidance branch, in the sample's `shape` [B, ...]."""
        branches = []
        for key, output in zip(call_keys(len(outputs)), outputs, strict=True):
            wide = output.float() if self.float_outputs else output
            for branch in self.outputs[key].branches(wide, shape[0]):
                if self.gather is not None:
                    positions = torch.from_numpy(self.gather).to(branch.device).flatten().long()
                    branches.append(branch.flatten(1).index_select(1, positions).reshape(shape))
                else:
                    branches.append(OUTPUT_SLICES[self.output_slice](branch, shape))
        return branches
