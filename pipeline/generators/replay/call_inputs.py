"""Rebuilds the inputs of recorded denoiser calls for any takes of any recorded steps, with any sample put in.

Rows of one call may come from several steps and parts of a trajectory, where their inputs can be laid side by side: a
call on a few small takes is mostly overhead, and what an objective compares need not have been drawn in one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.core.tensors import CallOutput, PackedTensor, SampleCopies, SharedSlot, map_leaves
from pipeline.core.types import RecordedCall, RecordedStep
from pipeline.generators.guidance import evaluate
from pipeline.generators.record.attention import apply_processors
from pipeline.generators.record.outputs import first_tensor
from pipeline.generators.spec import LIST, CallKey, InputKey, Layout, PolicySpec, Takes, call_keys


class Part(Protocol):
    """A trajectory part on a device (`replayer.Replayer`)."""

    total: int  # takes

    def tensor(self, leaf: PackedTensor | SharedSlot) -> torch.Tensor: ...

    def override(self, step: RecordedStep, key: InputKey) -> torch.Tensor | None: ...


class CannotJoin(Exception):
    """The rows differ in something that all takes of a call share."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """Takes of one recorded step."""

    part: Part
    step: RecordedStep
    takes: Takes | None  # positions in the part; None: all, as recorded

    @property
    def count(self) -> int:
        return self.part.total if self.takes is None else len(np.arange(self.part.total)[self.takes])


class CallInputs:
    """The input trees of the denoiser calls of `sources`, whose rows follow one another, or are given in `order`.

    `sample`: [b, ...], of all rows in that order. Building them raises `CannotJoin`.
    """

    def __init__(
        self, sources: Sequence[StepRows], sample: torch.Tensor, spec: PolicySpec, order: Sequence[int] | None = None
    ) -> None:
        self.sources, self.sample, self.spec = sources, sample, spec
        self.order = None if order is None or list(order) == list(range(len(order))) else list(order)
        self.layouts = spec.layouts if spec.layouts is not None else {}

    def tree(self, key: CallKey) -> dict[str, Any]:
        """{"args": ..., "kwargs": ...} of the calls with this key."""
        tree: dict[str, Any] = self._node(key, "", [source.step.calls[key.number].inputs for source in self.sources])
        return tree

    def _node(self, key: CallKey, path: str, nodes: list[Any]) -> Any:
        first = nodes[0]
        if isinstance(first, dict):
            if any(node.keys() != first.keys() for node in nodes):
                raise CannotJoin
            children = {name: [node[name] for node in nodes] for name in first}
            return {name: self._node(key, f"{path}.{name}" if path else str(name), c) for name, c in children.items()}
        if not isinstance(first, (list, tuple)):
            return self._leaf(InputKey(key, path), nodes)
        layout = self.layouts.get(InputKey(key, path))
        if layout is not None and layout.axis == LIST:
            entries = self._list(InputKey(key, path), nodes, layout)
        else:
            if any(len(node) != len(first) for node in nodes):
                raise CannotJoin
            entries = [self._node(key, f"{path}[{i}]", list(each)) for i, each in enumerate(zip(*nodes, strict=True))]
        if isinstance(first, list):
            return entries
        return type(first)(*entries) if hasattr(first, "_fields") else tuple(entries)

    def _list(self, key: InputKey, nodes: list[Any], layout: Layout) -> list[Any]:
        """A list with an entry per take and copy."""
        rows: list[list[Any]] = []  # per source, its entries
        for source, node in zip(self.sources, nodes, strict=True):
            single = CallInputs([StepRows(source.part, source.step, None)], self.sample, self.spec)
            entries = [single._node(key.call, f"{key.path}[{i}]", [entry]) for i, entry in enumerate(node)]
            takes = source.takes
            rows.append(entries if takes is None else layout.select_list(entries, takes, source.part.total))
        places = torch.arange(sum(len(entries) for entries in rows))
        starts = np.cumsum([0, *(len(entries) for entries in rows)])
        pieces = [places[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
        joined = self._side_by_side(pieces, layout.stacked).tolist()
        flat = [entry for entries in rows for entry in entries]
        entries = [flat[i] for i in joined]
        slots = self.spec.sample_slots.get(key)
        if slots is None:
            return entries
        return list(slots.fill(torch.stack(entries), self.sample, layout.stacked).unbind(0))

    def _leaf(self, key: InputKey, leaves: list[Any]) -> Any:
        first = leaves[0]
        overridden = [source.part.override(source.step, key) for source in self.sources]
        if overridden[0] is None and isinstance(first, SampleCopies):
            if any(leaf != first for leaf in leaves):
                raise CannotJoin
            return torch.cat([self.sample] * first.copies) if first.copies > 1 else self.sample
        if not isinstance(first, (PackedTensor, SharedSlot)):
            if any(not _same(leaf, first) for leaf in leaves):
                raise CannotJoin
            return first
        if any(not isinstance(leaf, (PackedTensor, SharedSlot)) for leaf in leaves):
            raise CannotJoin
        layout = self.layouts.get(key)
        tensors = []
        for source, leaf, override in zip(self.sources, leaves, overridden, strict=True):
            tensor = source.part.tensor(leaf) if override is None else override
            if layout is not None and source.takes is not None:
                tensor = layout.select(tensor, source.takes, source.part.total)
            tensors.append(tensor)
        if layout is None:  # the same for all takes of a call: it must be the same for all rows
            if any(tensor is not tensors[0] and not torch.equal(tensor, tensors[0]) for tensor in tensors):
                raise CannotJoin
            joined = tensors[0]
        else:
            joined = self._side_by_side(tensors, layout)
        slots = self.spec.sample_slots.get(key)
        return joined if slots is None else slots.fill(joined, self.sample, layout)

    def _side_by_side(self, tensors: list[torch.Tensor], layout: Layout) -> torch.Tensor:
        """The tensors of all sources' rows as one, in the rows' order."""
        if len(tensors) == 1 and self.order is None:
            return tensors[0]
        counts = [source.count for source in self.sources]
        takes = [layout.split(tensor, count) for tensor, count in zip(tensors, counts, strict=True)]
        if any(rows.shape[1:] != takes[0].shape[1:] or rows.dtype != takes[0].dtype for rows in takes):
            raise CannotJoin
        rows = torch.cat(takes)
        return layout.combine(rows if self.order is None else rows[self.order])


def run_calls(
    sources: Sequence[StepRows],
    sample: torch.Tensor,
    spec: PolicySpec,
    modules: Mapping[str, torch.nn.Module],
    order: Sequence[int] | None = None,
) -> torch.Tensor:
    """What the scheduler is given for `sample` [b, ...], the rows of `sources` one after another, or in `order`.

    All rows share their denoiser calls and guidance. Raises `CannotJoin` where they do not.
    """
    step = sources[0].step
    calls = [(call.modules, call.processors) for call in step.calls]
    for source in sources[1:]:
        others = [(call.modules, call.processors) for call in source.step.calls]
        if source.step.guidance != step.guidance or others != calls:
            raise CannotJoin
    inputs = CallInputs(sources, sample, spec, order)
    outputs = []
    for key, call in zip(call_keys(len(step.calls)), step.calls, strict=True):
        tree = inputs.tree(key)
        if call.before:
            tree = _with_outputs(call, tree, modules)
        apply_processors(modules[call.module], call.processors)
        outputs.append(first_tensor(modules[call.module](*tree["args"], **tree["kwargs"])))
    return evaluate(step.guidance, spec.branches(outputs, sample.shape), sample, spec.sign)


def _with_outputs(call: RecordedCall, tree: dict[str, Any], modules: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    """The input tree of a call with the outputs of the calls before it, which are made here, in their places."""
    made: list[dict[str, Any]] = []  # per call before, the leaves of its output by path
    for other, inputs in zip(call.before, tree["before"], strict=True):
        made.append({})
        map_leaves(made[-1].setdefault, modules[other.module](*inputs["args"], **inputs["kwargs"]))

    def filled(_path: str, leaf: Any) -> Any:
        return made[leaf.call][leaf.path] if isinstance(leaf, CallOutput) else leaf

    return {name: map_leaves(filled, tree[name]) for name in ("args", "kwargs")}


def _same(leaf: Any, other: Any) -> bool:
    if isinstance(leaf, np.ndarray) or isinstance(other, np.ndarray):
        return type(leaf) is type(other) and np.array_equal(leaf, other)
    return type(leaf) is type(other) and bool(leaf == other)
