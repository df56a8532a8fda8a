"""Merges several trained steps of a part into one step whose takes lie side by side.

A denoiser call on a few small takes is mostly overhead; one call for several noise levels costs less than one for each.
The learner merges steps where the denoiser is given a timestep per take, so that their recorded inputs can be joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.core.tensors import PackedTensor, SampleCopies, SharedSlot, map_leaves
from pipeline.core.types import RecordedCall, RecordedStep, TrajectoryPart
from pipeline.generators.replay.replayer import Replayer
from pipeline.generators.spec import LIST, CallKey, InputKey, Layout, Layouts, PolicySpec, call_keys


class MergedReplayer(Replayer):
    """Replays several trained steps of one part in one call; `plain` replays them one by one."""

    def __init__(self, plain: Replayer, positions: Sequence[int], part: TrajectoryPart) -> None:
        """`part`: the steps at these `positions` of `plain`'s part, merged."""
        super().__init__(part, plain.spec, plain.modules, plain.device)
        self._plain, self.positions = plain, tuple(positions)

    @property
    def plain(self) -> Replayer:
        return self._plain

    def positions_of(self, j: int) -> tuple[int, ...]:
        return self.positions


def merged(plain: Replayer, takes: int) -> list[Replayer]:
    """Replayers that together cover all trained steps of `plain`, each with at most `takes` takes in its one call;
    an empty list where its steps cannot be merged, or no two of them fit."""
    steps_per_call, steps = takes // plain.total, range(len(plain.part.steps))
    if steps_per_call < 2 or len(steps) < 2:
        return []
    replayers: list[Replayer] = []
    for start in range(0, len(steps), steps_per_call):
        positions = steps[start : start + steps_per_call]
        part = merge_steps(plain.part, plain.spec, positions)
        if part is None:
            return []
        replayers.append(MergedReplayer(plain, positions, part))
    return replayers


class _CannotMerge(Exception):
    """The steps differ in something that all takes of a call share."""


def merge_steps(part: TrajectoryPart, spec: PolicySpec, positions: Sequence[int]) -> TrajectoryPart | None:
    """The trained steps at `positions` of a part as a part of one step with len(positions) x K takes, in step order.

    Inputs and `final` are those of all steps; sigmas and guidance are the first step's. None where the steps cannot be
    merged: the layouts are unknown, or the steps differ in an input that is not given per take.
    """
    steps = [part.steps[j] for j in positions]
    first = steps[0]
    modules = [[(call.modules, call.processors) for call in step.calls] for step in steps]
    if spec.layouts is None or any(step.mask is not None for step in steps):
        return None
    if any(step.guidance != first.guidance for step in steps) or any(entry != modules[0] for entry in modules):
        return None
    try:
        calls = tuple(_merge_call(steps, key, part, spec.layouts) for key in call_keys(len(first.calls)))
    except _CannotMerge:
        return None
    total = part.stop - part.start
    merged = replace(
        first,
        sample=_stacked([step.sample for step in steps]),
        next_sample=_stacked([step.next_sample for step in steps]),
        log_prob=None,
        mean=None,
        calls=calls,
    )
    final = _stacked([part.final] * len(steps))
    return TrajectoryPart(start=0, stop=total * len(steps), steps=(merged,), shared=(), final=final, drawn=part.drawn)


def _merge_call(steps: list[RecordedStep], key: CallKey, part: TrajectoryPart, layouts: Layouts) -> RecordedCall:
    calls = [step.calls[key.number] for step in steps]
    if any(entry.call == key and layout.axis == LIST for entry, layout in layouts.items()):
        raise _CannotMerge
    leaves = [_leaves(call) for call in calls]
    if any(step_leaves.keys() != leaves[0].keys() for step_leaves in leaves):
        raise _CannotMerge

    def merge(path: str, leaf: Any) -> Any:
        return _merge_input([step_leaves[path] for step_leaves in leaves], part, layouts.get(InputKey(key, path)))

    inputs = map_leaves(merge, calls[0].inputs)
    return calls[0].with_inputs(inputs)


def _leaves(call: RecordedCall) -> dict[str, Any]:
    """Path -> leaf."""
    leaves: dict[str, Any] = {}
    map_leaves(leaves.setdefault, call.inputs)
    return leaves


def _merge_input(leaves: list[Any], part: TrajectoryPart, layout: Layout | None) -> Any:
    """One input of all steps."""
    values = [part.shared[leaf.index] if isinstance(leaf, SharedSlot) else leaf for leaf in leaves]
    first = values[0]
    if not isinstance(first, PackedTensor) or any(not isinstance(value, PackedTensor) for value in values):
        if isinstance(first, (PackedTensor, np.ndarray)) or any(
            type(value) is not type(first) or value != first for value in values
        ):
            raise _CannotMerge
        return SampleCopies(first.copies) if isinstance(first, SampleCopies) else first
    if layout is None:  # the same for all takes of a call: it must be the same at all steps
        if any(not np.array_equal(packed.data, first.data) for packed in values):
            raise _CannotMerge
        return first
    return PackedTensor(_side_by_side([packed.data for packed in values], layout, part.stop - part.start), first.dtype)


def _side_by_side(arrays: list[np.ndarray], layout: Layout, total: int) -> np.ndarray:
    """Joins along the axis of the takes; where copies are tiled (guidance branches), within each copy."""
    axis = layout.axis
    if layout.order == "repeat":
        return np.concatenate(arrays, axis=axis)
    before, after = arrays[0].shape[:axis], arrays[0].shape[axis + 1 :]
    split = [array.reshape(*before, -1, total * layout.inner, *after) for array in arrays]
    return np.concatenate(split, axis=axis + 1).reshape(*before, -1, *after)


def _stacked(packed: list[PackedTensor]) -> PackedTensor:
    return PackedTensor(np.concatenate([entry.data for entry in packed]), packed[0].dtype)
