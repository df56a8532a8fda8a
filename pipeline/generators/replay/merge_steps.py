"""Several trained steps of a part as one step with their takes side by side.

A denoiser call on few small takes is mostly overhead; one call for several noise levels costs less than one for each.
Where the noise level reaches the denoiser by take (a timestep for each), the steps' recorded inputs can be joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.core.tensors import PackedTensor, SampleSlot, SharedSlot, map_leaves
from pipeline.core.types import RecordedStep, TrajectoryPart
from pipeline.generators.replay.replayer import Replayer
from pipeline.generators.spec import LIST, Layout, PolicySpec


class MergedReplayer(Replayer):
    """Replays several trained steps of one part in one call; `plain` replays them one by one."""

    def __init__(self, plain: Replayer, chosen: Sequence[int], part: TrajectoryPart) -> None:
        super().__init__(part, plain.spec, plain.modules, plain.device)
        self._plain, self.chosen = plain, tuple(chosen)

    @property
    def plain(self) -> Replayer:
        return self._plain

    def steps_of(self, j: int) -> list[RecordedStep]:
        return [self._plain.part.steps[i] for i in self.chosen]


def merged(plain: Replayer, takes: int) -> list[Replayer]:
    """Replayers that together cover all trained steps of `plain`, each with at most `takes` takes in its one call;
    an empty list where its steps cannot be joined, or no two of them fit."""
    at_once, steps = takes // plain.total, range(len(plain.part.steps))
    if at_once < 2 or len(steps) < 2:
        return []
    found: list[Replayer] = []
    for start in range(0, len(steps), at_once):
        chosen = steps[start : start + at_once]
        part = merge_steps(plain.part, plain.spec, chosen)
        if part is None:
            return []
        found.append(MergedReplayer(plain, chosen, part))
    return found


class _CannotJoin(Exception):
    """The steps differ in something that all takes of a call share."""


def merge_steps(part: TrajectoryPart, spec: PolicySpec, chosen: Sequence[int]) -> TrajectoryPart | None:
    """The trained steps `chosen` (positions) of a part as a part of one step with len(chosen) x K takes, in step order.

    Its inputs and `final` are those of all of them; its step's numbers are the first one's. None where the steps cannot
    be joined: the takes' places are not known, or the steps differ in what is not given by take.
    """
    steps = [part.steps[j] for j in chosen]
    first = steps[0]
    guidance = [(step.guidance_scale, step.rule, step.rule_extra) for step in steps]
    modules = [[(call.module, call.processors) for call in step.calls] for step in steps]
    if spec.layouts is None or any(step.mask is not None for step in steps):
        return None
    if any(entry != guidance[0] for entry in guidance) or any(entry != modules[0] for entry in modules):
        return None
    try:
        calls = tuple(_join_call(steps, number, part, spec.layouts) for number in range(len(first.calls)))
    except _CannotJoin:
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
    return TrajectoryPart(start=0, stop=total * len(steps), steps=(merged,), shared=(), final=final)


def _join_call(steps: list[RecordedStep], number: int, part: TrajectoryPart, layouts: dict[str, Layout]) -> Any:
    calls = [step.calls[number] for step in steps]
    key = f"{len(steps[0].calls)}.{number}"
    if any(name.startswith(f"{key}:") and layout.axis == LIST for name, layout in layouts.items()):
        raise _CannotJoin
    leaves = [_leaves(call) for call in calls]
    if any(found.keys() != leaves[0].keys() for found in leaves):
        raise _CannotJoin

    def join(path: str, leaf: Any) -> Any:
        return _join([found[path] for found in leaves], part, layouts.get(f"{key}:{path}"))

    tree = map_leaves(join, {"args": calls[0].args, "kwargs": calls[0].kwargs})
    return replace(calls[0], args=tree["args"], kwargs=tree["kwargs"])


def _leaves(call: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    map_leaves(found.setdefault, {"args": call.args, "kwargs": call.kwargs})
    return found


def _join(leaves: list[Any], part: TrajectoryPart, layout: Layout | None) -> Any:
    """One input of all steps."""
    arrays = [part.shared[leaf.index] if isinstance(leaf, SharedSlot) else leaf for leaf in leaves]
    first = arrays[0]
    if not isinstance(first, PackedTensor) or any(not isinstance(leaf, PackedTensor) for leaf in arrays):
        if isinstance(first, (PackedTensor, np.ndarray)) or any(
            type(a) is not type(first) or a != first for a in arrays
        ):
            raise _CannotJoin
        return SampleSlot(first.copies) if isinstance(first, SampleSlot) else first
    if layout is None:  # the same for all takes of a call: it must be the same at all steps
        if any(not np.array_equal(packed.data, first.data) for packed in arrays):
            raise _CannotJoin
        return first
    return PackedTensor(_side_by_side([packed.data for packed in arrays], layout, part.stop - part.start), first.dtype)


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
