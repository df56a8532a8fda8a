"""Computes sampler steps once for all takes of a call that are still equal.

With `sampler.same_initial_noise`, the takes of a group diverge where its window of stochastic steps begins (MixGRPO,
arXiv 2507.21802; Flow-GRPO-Fast); a fork diverges from its parent at its own step, and what noise both drew before is
the same (B2-DiffuRL, BranchGRPO). Until then the rows of a denoiser call repeat. The call is made with one row of each
kind, and its output is expanded to all takes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from pipeline.core.tensors import map_leaves
from pipeline.core.types import Lineage, SamplingSpec
from pipeline.generators.spec import CallKey, InputKey, PolicySpec, map_call_inputs


def origins_by_step(
    starts: Sequence[Hashable], lineages: Sequence[Lineage], sampling: SamplingSpec
) -> list[list[Hashable]]:
    """For each sampler step, what a take's sample after it comes from: equal for takes that are equal. Ends where no
    two takes are. `starts`: equal for takes with equal conditions and initial noise."""
    steps: list[list[Hashable]] = []
    for step in range(sampling.num_steps):
        noisy = [index for index in sampling.stochastic_steps if index <= step]
        origins: list[Hashable] = [
            (start, tuple(max(entry for entry in lineage if entry[0] <= index) for index in noisy))
            for start, lineage in zip(starts, lineages, strict=True)
        ]
        if len(set(origins)) == len(origins):
            break
        steps.append(origins)
    return steps


class SharedPrefix:
    """Which takes of a pipeline call are equal, step by step."""

    def __init__(self, origins: Sequence[Sequence[Hashable]], spec: PolicySpec) -> None:
        """`origins`: see `origins_by_step`. The inputs of every call are compared all the same; where they differ, the
        call is made with all takes."""
        self.distinct: list[list[int]] = []  # per step: one take of each kind
        self.positions: list[list[int]] = []  # per step and take, within `distinct`
        for kinds in origins:
            first = {kind: take for take, kind in reversed(list(enumerate(kinds)))}
            distinct = sorted(first.values())
            self.distinct.append(distinct)
            self.positions.append([distinct.index(first[kind]) for kind in kinds])
        self.total, self.spec = len(origins[0]) if origins else 0, spec
        counts = {key.calls for key in spec.outputs}
        # Layouts are keyed by the number of calls in a step, which is known too late unless it never changes.
        self.calls = counts.pop() if len(counts) == 1 else 0
        self.layouts = spec.layouts if spec.layouts is not None else {}
        self.active = self.calls > 0 and bool(origins) and spec.layouts is not None

    def distinct_inputs(self, step: int, number: int, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """(args, kwargs) of the step's denoiser call `number` for the distinct takes; None where all are needed."""
        if not self.active or number >= self.calls or step >= len(self.distinct):
            return None
        chosen, positions = self.distinct[step], self.positions[step]
        call, inputs = CallKey(self.calls, number), {"args": args, "kwargs": kwargs}
        distinct = self._select(inputs, call, chosen, self.total)
        expanded = self._select(distinct, call, positions, len(chosen))
        if not _equal(inputs, expanded) or _equal(inputs, distinct):
            return None
        return distinct["args"], distinct["kwargs"]

    def expand_output(self, step: int, number: int, output: torch.Tensor) -> torch.Tensor:
        """The output of a call with the distinct takes, for all takes."""
        layout = self.spec.outputs[CallKey(self.calls, number)]
        return layout.select(output, self.positions[step], len(self.distinct[step]))

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
