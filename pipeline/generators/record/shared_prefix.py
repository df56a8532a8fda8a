"""The sampler steps before a group's first noise, computed once for all takes that are still the same.

With `sampler.same_initial_noise`, the takes of a group part where its window of stochastic steps begins (MixGRPO,
arXiv 2507.21802; Flow-GRPO-Fast). Until then every denoiser call of a batch has equal rows. The
call is given one row of each kind, and its output is spread to all.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from pipeline.core.tensors import map_leaves
from pipeline.generators.spec import PolicySpec, map_call_inputs


class SharedPrefix:
    """Which takes of a pipeline call are equal until sampler step `until` (not included)."""

    def __init__(self, origins: Sequence[Hashable], until: int, spec: PolicySpec) -> None:
        """`origins`: equal for takes with equal conditions, initial noise and random generators. Whether their inputs
        are equal is looked at in each call all the same, and where they are not, the call is left as it is."""
        first = {origin: number for number, origin in reversed(list(enumerate(origins)))}
        self.kept = sorted(first.values())
        self.place = [self.kept.index(first[origin]) for origin in origins]
        self.total, self.until, self.spec = len(origins), until, spec
        calls = {key.split(".")[0] for key in spec.outputs}
        # Where takes are in a call's inputs is known by the number of calls of a step, which shows too late.
        self.calls = int(calls.pop()) if len(calls) == 1 else 0
        self.helps = self.calls > 0 and len(self.kept) < self.total and spec.layouts is not None

    def cut(self, number: int, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Inputs of the step's denoiser call `number` with one take of each kind; None where the call must be whole."""
        if not self.helps or number >= self.calls:
            return None
        key, whole = f"{self.calls}.{number}", {"args": args, "kwargs": kwargs}
        few = self._pick(whole, key, self.kept, self.total)
        again = self._pick(few, key, self.place, len(self.kept))
        return (few["args"], few["kwargs"]) if _equal(whole, again) and not _equal(whole, few) else None

    def spread(self, number: int, output: torch.Tensor) -> torch.Tensor:
        """The output of a call that was cut, for all takes."""
        return self.spec.outputs[f"{self.calls}.{number}"].select(output, self.place, len(self.kept))

    def _pick(self, tree: Any, key: str, takes: list[int], total: int) -> Any:
        def leaf(path: str, value: Any) -> Any:
            layout = self.spec.layouts.get(f"{key}:{path}")
            return (
                value if layout is None or not isinstance(value, torch.Tensor) else layout.select(value, takes, total)
            )

        return map_call_inputs(tree, "", self.spec.layouts, key, takes, total, leaf)


def _equal(one: Any, other: Any) -> bool:
    leaves: list[dict[str, Any]] = [{}, {}]
    map_leaves(leaves[0].setdefault, one)
    map_leaves(leaves[1].setdefault, other)
    return leaves[0].keys() == leaves[1].keys() and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b
        for a, b in zip(leaves[0].values(), leaves[1].values(), strict=True)
    )
