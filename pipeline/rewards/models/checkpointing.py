"""Gradients through a reward model at the memory of one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.rewards.models.pretrained import batches

if TYPE_CHECKING:
    import torch


def in_batches(
    function: Callable[..., torch.Tensor], pixels: torch.Tensor, batch: int, *rows: torch.Tensor
) -> torch.Tensor:
    """`function` of `batch` entries at a time of pixels [N, ...] and further tensors [N, ...], joined.

    With more than one batch the activations of each are computed again in the backward pass, so that only one batch's
    are held. The function has to be free of randomness.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    again = len(pixels) > batch and torch.is_grad_enabled() and pixels.requires_grad
    parts = []
    for part in batches(len(pixels), batch):
        inputs = [tensor[part] for tensor in (pixels, *rows)]
        parts.append(
            checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False) if again else function(*inputs)
        )
    return torch.cat(parts)
