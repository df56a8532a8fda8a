"""Draws several groups of a step in one pipeline call, and splits the recorded part into a trajectory part per group.

A denoiser call on a few small takes is mostly overhead, and groups are often small. The pipeline is given all prompts
at once. Probing has found where its inputs hold the takes, so each group's part is what its own call would have
recorded, up to the rounding of kernels that depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.core.tensors import PackedTensor, SharedSlot, pack, unpack
from pipeline.core.types import GroupWork, RecordedCall, RecordedStep, SamplingSpec, TrajectoryPart
from pipeline.generators.spec import CallKey, InputKey, Layout, PolicySpec, call_keys, map_call_inputs


def joint_sampling(works: Sequence[GroupWork]) -> SamplingSpec | None:
    """The sampling of one call for all of these groups: every step that any of them trains is recorded. None where
    they differ in more than their trained steps, or one keeps no trajectory."""
    trained = sorted({index for work in works for index in work.sampling.trained_steps})
    joint = replace(works[0].sampling, trained_steps=tuple(trained))
    compatible = all(replace(work.sampling, trained_steps=joint.trained_steps) == joint for work in works)
    return joint if compatible and all(work.sampling.trained_steps for work in works) else None


def split_part(part: TrajectoryPart, spec: PolicySpec, takes: slice, trained_steps: Sequence[int]) -> TrajectoryPart:
    """The given takes (positions in the part) and sampler steps of a part, as a part that starts at 0."""
    if spec.layouts is None:
        raise RuntimeError("the denoiser's inputs cannot be split by take")
    layouts, total = spec.layouts, part.stop - part.start
    shared: list[PackedTensor] = []
    slots: dict[tuple[int, Layout | None], SharedSlot] = {}  # (old slot, how its takes were selected) -> new slot

    def split_leaf(key: InputKey, leaf: Any) -> Any:
        layout = layouts.get(key)
        if isinstance(leaf, SharedSlot):
            slot = (leaf.index, layout)
            if slot not in slots:
                slots[slot] = SharedSlot(len(shared))
                shared.append(_select(part.shared[leaf.index], layout, takes, total))
            return slots[slot]
        return _select(leaf, layout, takes, total) if isinstance(leaf, PackedTensor) else leaf

    def split_call(call: RecordedCall, key: CallKey) -> RecordedCall:
        inputs = map_call_inputs(
            call.inputs, layouts, key, takes, total, lambda path, leaf: split_leaf(InputKey(key, path), leaf)
        )
        return call.with_inputs(inputs)

    def split_step(step: RecordedStep) -> RecordedStep:
        keys = call_keys(len(step.calls))
        return replace(
            step,
            sample=_rows(step.sample, takes),
            next_sample=_rows(step.next_sample, takes),
            log_prob=None if step.log_prob is None else step.log_prob[takes].copy(),
            mean=None if step.mean is None else step.mean[takes].copy(),
            mask=None if step.mask is None else _rows(step.mask, takes),
            calls=tuple(split_call(call, key) for call, key in zip(step.calls, keys, strict=True)),
        )

    steps = tuple(split_step(step) for step in part.steps if step.index in trained_steps)
    size = takes.stop - takes.start
    final = _rows(part.final, takes)
    return TrajectoryPart(start=0, stop=size, steps=steps, shared=tuple(shared), final=final, drawn=part.drawn)


def _rows(packed: PackedTensor, takes: slice) -> PackedTensor:
    return PackedTensor(np.array(packed.data[takes]), packed.dtype)


def _select(packed: PackedTensor, layout: Layout | None, takes: slice, total: int) -> PackedTensor:
    """The takes of an input; without a layout it is the same for all takes."""
    return packed if layout is None else pack(layout.select(unpack(packed), takes, total))
