"""Reads and replaces the tensor of a denoiser's output, whatever structure it is wrapped in."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.tensors import map_leaves


def first_tensor(output: Any) -> torch.Tensor:
    """The tensor of a denoiser's output: itself, the first of a tuple, or `.sample`; a list of tensors is stacked."""
    if isinstance(output, torch.Tensor):
        return output
    if _is_tensor_list(output):
        if any(entry.shape != output[0].shape for entry in output):
            raise UnsupportedPolicyError("the denoiser returns tensors of different shapes for the takes of a batch")
        return torch.stack(output)
    if hasattr(output, "sample"):
        return first_tensor(output.sample)
    if isinstance(output, dict):
        return first_tensor(next(iter(output.values())))
    return first_tensor(output[0])


def replace_first(output: Any, value: torch.Tensor) -> Any:
    """`output` with its first tensor (see `first_tensor`) replaced."""
    if isinstance(output, torch.Tensor):
        return value
    if _is_tensor_list(output):
        return list(value.unbind(0))
    if hasattr(output, "sample"):
        output = type(output)(**output)
        output.sample = replace_first(output.sample, value)
        return output
    return type(output)([replace_first(output[0], value), *output[1:]])


def has_one_tensor(output: Any) -> bool:
    """Whether an output holds no tensor besides its first."""
    leaves: list[Any] = []
    map_leaves(lambda _, leaf: leaves.append(leaf), replace_first(output, torch.zeros(0)))
    return not any(isinstance(leaf, torch.Tensor) and leaf.numel() for leaf in leaves)


def _is_tensor_list(output: Any) -> bool:
    return isinstance(output, list) and bool(output) and all(isinstance(entry, torch.Tensor) for entry in output)
