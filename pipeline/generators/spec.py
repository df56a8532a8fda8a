"""What probing found out about a pipeline: all that replay needs to know, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the takes are in a tensor: `axis` holds `copies` x B entries, ordered copy-major ("tile", as in a doubled
    guidance batch) or take-major ("repeat", as with frames folded into the batch)."""

    axis: int
    copies: int
    order: str

    def take(self, tensor: torch.Tensor, takes: slice, total: int) -> torch.Tensor:
        """The entries of the takes in `takes` (of `total`), in the same order."""
        inner = (self.copies, total) if self.order == "tile" else (total, self.copies)
        split = tensor.unflatten(self.axis, inner)
        index = [slice(None)] * split.ndim
        index[self.axis + (1 if self.order == "tile" else 0)] = takes
        return split[tuple(index)].flatten(self.axis, self.axis + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySpec:
    """A pipeline as a policy."""

    pipeline: str
    prediction: str  # flow | epsilon | v_prediction | sample
    rule: str  # a key of guidance.RULES
    scale: float | None  # guidance scale of the rule; None: the pipeline's own at each step
    cut: str  # a key of guidance.CUTS
    layouts: dict[str, Layout]  # "<call>:<path>" -> where the takes are; absent: the same for every take
    outputs: list[Layout]  # per call of a step

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PolicySpec:
        return cls(
            **{k: v for k, v in data.items() if k not in ("layouts", "outputs")},
            layouts={key: Layout(**value) for key, value in data["layouts"].items()},
            outputs=[Layout(**value) for value in data["outputs"]],
        )
