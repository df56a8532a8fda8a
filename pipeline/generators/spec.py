"""What probing found out about a pipeline: all that replay needs to know, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

LIST = -1  # Layout.axis of a list with an entry per take


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the takes are in a tensor: `axis` holds `copies` x B entries, ordered copy-major ("tile", as in a doubled
    guidance batch) or take-major ("repeat", as with frames folded into the batch). `inner` entries in a row belong to
    one take of one copy (a doubled guidance batch of folded frames). Axis LIST: a list rather than a tensor."""

    axis: int
    copies: int
    order: str
    inner: int = 1

    def select(self, tensor: torch.Tensor, takes: slice | list[int], total: int) -> torch.Tensor:
        """The entries of the takes in `takes` (of `total`), in the order given.

        Tiled copies are counted from the tensor itself, since a pipeline may drop a branch at some steps.
        """
        if self.order == "tile":
            copies = tensor.shape[self.axis] // (total * self.inner)
            split, at = tensor.unflatten(self.axis, (copies, total, self.inner)), self.axis + 1
        else:
            split, at = tensor.unflatten(self.axis, (total, self.copies)), self.axis
        index = [slice(None)] * split.ndim
        index[at] = takes
        taken = split[tuple(index)].flatten(self.axis, self.axis + (2 if self.order == "tile" else 1))
        return taken.contiguous()  # as recorded inputs are: some models call `view` on them

    def select_list(self, entries: list[Any] | tuple[Any, ...], takes: slice | list[int], total: int) -> list[Any]:
        """The same for a list."""
        index = self.select(torch.arange(len(entries)), takes, total) if self.axis == 0 else None
        if index is None:
            index = Layout(axis=0, copies=self.copies, order=self.order, inner=self.inner).select(
                torch.arange(len(entries)), takes, total
            )
        return [entries[i] for i in index.tolist()]

    def branches(self, output: torch.Tensor, total: int) -> list[torch.Tensor]:
        """A denoiser output [copies x B x inner, ...] -> one [B, ...] (or [B, inner, ...]) per copy."""
        if self.order == "repeat":
            return [output.unflatten(0, (total, self.copies))] if self.copies > 1 else [output]
        split = output.unflatten(0, (-1, total, self.inner)) if self.inner > 1 else output.unflatten(0, (-1, total))
        return list(split.unbind(0))


def map_call_inputs(
    node: Any, path: str, layouts: dict[str, Layout], key: str, takes: slice | list[int], total: int, leaf: Any
) -> Any:
    """Rebuilds the input tree of call `key` with leaves `leaf(path, leaf)`; lists with an entry per take are cut to the
    takes."""
    if isinstance(node, dict):
        return {
            k: map_call_inputs(v, f"{path}.{k}" if path else str(k), layouts, key, takes, total, leaf)
            for k, v in node.items()
        }
    if isinstance(node, (list, tuple)):
        built = [map_call_inputs(v, f"{path}[{i}]", layouts, key, takes, total, leaf) for i, v in enumerate(node)]
        layout = layouts.get(f"{key}:{path}")
        if layout is not None and layout.axis == LIST:
            built = layout.select_list(built, takes, total)
        if isinstance(node, list):
            return built
        return type(node)(*built) if hasattr(node, "_fields") else tuple(built)
    return leaf(path, node)


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySpec:
    """A pipeline as a policy."""

    pipeline: str
    prediction: str  # flow | epsilon | v_prediction | sample
    rules: dict[str, str]  # "<branches>" of a step -> a key of guidance.RULES, or guidance.LINEAR_FIT
    sign: float  # -1: the pipeline hands the scheduler the negated value
    output_slice: str  # a key of guidance.OUTPUT_SLICES, or "gather"
    gather: np.ndarray | None  # int32 [...]: for each value the scheduler is given, its place in a branch's output
    layouts: dict[str, Layout] | None  # "<calls>.<call>:<path>" -> where the takes are; absent: the same for all takes.
    # None: not found; a part is then replayed whole and cut afterwards
    outputs: dict[str, Layout]  # "<calls>.<call>" -> where takes and branches are in the output

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PolicySpec:
        layouts = data["layouts"]
        return cls(
            **{k: v for k, v in data.items() if k not in ("layouts", "outputs")},
            layouts=None if layouts is None else {key: Layout(**value) for key, value in layouts.items()},
            outputs={key: Layout(**value) for key, value in data["outputs"].items()},
        )
