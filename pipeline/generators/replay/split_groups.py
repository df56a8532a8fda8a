"""Several groups of a step in one pipeline call, and what the call left behind taken apart again, group by group.

A denoiser call on few small takes is mostly overhead, and a group is often small. The pipeline is given all the prompts
at once; where its inputs hold the takes is known from probing, so each group's trajectory is what a call of its own
would have recorded, to the rounding of kernels that look at the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.core.tensors import PackedTensor, SharedSlot, pack, unpack
from pipeline.core.types import GroupWork, RecordedCall, RecordedStep, SamplingSpec, TrajectoryPart
from pipeline.generators.spec import Layout, PolicySpec, map_call_inputs


def joint_sampling(works: Sequence[GroupWork]) -> SamplingSpec | None:
    """How all of them can be drawn in one call: every step that any of them trains is recorded. None where they differ
    in more than that, or some keep no trajectory."""
    first = works[0].sampling
    trained = sorted({index for work in works for index in work.sampling.trained_steps})
    joint = replace(first, trained_steps=tuple(trained))
    alike = all(replace(work.sampling, trained_steps=joint.trained_steps) == joint for work in works)
    return joint if alike and all(work.sampling.trained_steps for work in works) else None


def cut_part(part: TrajectoryPart, spec: PolicySpec, takes: slice, trained_steps: Sequence[int]) -> TrajectoryPart:
    """Of a part, the given takes (places in the part) and sampler steps, as a part of its own."""
    if spec.layouts is None:
        raise RuntimeError("takes cannot be told apart in the denoiser's inputs")
    layouts, total = spec.layouts, part.stop - part.start
    shared: list[PackedTensor] = []
    places: dict[tuple[int, Layout | None], SharedSlot] = {}

    def leaf_of(key: str, path: str, leaf: Any) -> Any:
        layout = layouts.get(f"{key}:{path}")
        if isinstance(leaf, SharedSlot):
            if (leaf.index, layout) not in places:
                places[leaf.index, layout] = SharedSlot(len(shared))
                shared.append(_entries(part.shared[leaf.index], layout, takes, total))
            return places[leaf.index, layout]
        return _entries(leaf, layout, takes, total) if isinstance(leaf, PackedTensor) else leaf

    def call_of(call: RecordedCall, key: str) -> RecordedCall:
        tree = {"args": call.args, "kwargs": call.kwargs}
        tree = map_call_inputs(tree, "", layouts, key, takes, total, lambda path, leaf: leaf_of(key, path, leaf))
        return replace(call, args=tree["args"], kwargs=tree["kwargs"])

    def step_of(step: RecordedStep) -> RecordedStep:
        count = len(step.calls)
        return replace(
            step,
            sample=_rows(step.sample, takes),
            next_sample=_rows(step.next_sample, takes),
            log_prob=None if step.log_prob is None else step.log_prob[takes].copy(),
            mean=None if step.mean is None else step.mean[takes].copy(),
            mask=None if step.mask is None else _rows(step.mask, takes),
            calls=tuple(call_of(call, f"{count}.{number}") for number, call in enumerate(step.calls)),
        )

    steps = tuple(step_of(step) for step in part.steps if step.index in trained_steps)
    size = takes.stop - takes.start
    return TrajectoryPart(start=0, stop=size, steps=steps, shared=tuple(shared), final=_rows(part.final, takes))


def _rows(packed: PackedTensor, takes: slice) -> PackedTensor:
    return PackedTensor(np.array(packed.data[takes]), packed.dtype)


def _entries(packed: PackedTensor, layout: Layout | None, takes: slice, total: int) -> PackedTensor:
    """Without a layout an input is the same for all takes."""
    return packed if layout is None else pack(layout.select(unpack(packed), takes, total))
