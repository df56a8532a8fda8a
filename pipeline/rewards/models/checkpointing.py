"""A reward model's forward pass batch by batch: with gradients, at the memory of one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.rewards.models.images import Frames
from pipeline.rewards.models.pretrained import batches

if TYPE_CHECKING:
    import torch


def in_batches(function: Callable[..., torch.Tensor], frames: Frames, batch: int, *rows: torch.Tensor) -> torch.Tensor:
    """`function` of `batch` entries at a time of N frames and further tensors [N, ...], joined.

    With gradients and more than one batch the activations of each are computed again in the backward pass, so that only
    one batch's are held. The function has to be free of randomness.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    gradients = isinstance(frames, torch.Tensor) and frames.requires_grad and torch.is_grad_enabled()
    again = gradients and len(frames) > batch
    parts = []
    for part in batches(len(frames), batch):
        inputs = [tensor[part] for tensor in (frames, *rows)]
        parts.append(
            checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False) if again else function(*inputs)
        )
    return torch.cat(parts)
