"""Computes the sampler steps before a group's first noise once for all takes that are still equal.

With `sampler.same_initial_noise`, the takes of a group diverge where its window of stochastic steps begins (MixGRPO,
arXiv 2507.21802; Flow-GRPO-Fast). Until then the rows of a denoiser call repeat. The call is made with one row of each
kind, and its output is expanded to all takes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from pipeline.core.tensors import map_leaves
from pipeline.generators.spec import CallKey, InputKey, PolicySpec, map_call_inputs


class SharedPrefix:
    """Which takes of a pipeline call are equal until sampler step `until` (exclusive)."""

    def __init__(self, origins: Sequence[Hashable], until: int, spec: PolicySpec) -> None:
        """`origins`: equal for takes with equal conditions, initial noise and random generators. The inputs of every
        call are compared all the same; where they differ, the call is made with all takes."""
        first = {origin: take for take, origin in reversed(list(enumerate(origins)))}
        self.distinct = sorted(first.values())  # one take of each kind
        self.positions = [self.distinct.index(first[origin]) for origin in origins]  # per take, within `distinct`
        self.total, self.until, self.spec = len(origins), until, spec
        counts = {key.calls for key in spec.outputs}
        # Layouts are keyed by the number of calls in a step, which is known too late unless it never changes.
        self.calls = counts.pop() if len(counts) == 1 else 0
        self.layouts = spec.layouts if spec.layouts is not None else {}
        self.active = self.calls > 0 and len(self.distinct) < self.total and spec.layouts is not None

    def distinct_inputs(self, number: int, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """(args, kwargs) of the step's denoiser call `number` for the distinct takes; None where all are needed."""
        if not self.active or number >= self.calls:
            return None
        call, inputs = CallKey(self.calls, number), {"args": args, "kwargs": kwargs}
        distinct = self._select(inputs, call, self.distinct, self.total)
        expanded = self._select(distinct, call, self.positions, len(self.distinct))
        if not _equal(inputs, expanded) or _equal(inputs, distinct):
            return None
        return distinct["args"], distinct["kwargs"]

    def expand_output(self, number: int, output: torch.Tensor) -> torch.Tensor:
        """The output of a call with the distinct takes, for all takes."""
        return self.spec.outputs[CallKey(self.calls, number)].select(output, self.positions, len(self.distinct))

    def _select(self, inputs: Any, call: CallKey, takes: list[int], total: int) -> Any:
        def select(path: str, leaf: Any) -> Any:
            layout = self.layouts.get(InputKey(call, path))
            return leaf if layout is None or not isinstance(leaf, torch.Tensor) else layout.select(leaf, takes, total)

        return map_call_inputs(inputs, self.layouts, call, takes, total, select)


def _equal(tree: Any, other: Any) -> bool:
    """Whether two input trees hold equal tensors, and otherwise the very same objects."""
    leaves: list[dict[str, Any]] = [{}, {}]
    map_leaves(leaves[0].setdefault, tree)
    map_leaves(leaves[1].setdefault, other)
    return leaves[0].keys() == leaves[1].keys() and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b
        for a, b in zip(leaves[0].values(), leaves[1].values(), strict=True)
    )
