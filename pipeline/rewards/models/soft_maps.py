"""How well a map extracted from a picture agrees with the given one, differentiable: the soft forms of F1 and mean IoU
(probabilities in place of decisions), and the RMSE of depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def edge_probability(pixels: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """float [N, 3, H, W] from 0 to 1 -> [N, H, W]: sigmoid of the strongest channel's |dx| + |dy| (3 x 3 Sobel, as in
    `canny`), 1/2 half-way between the thresholds, 0.88 at `high` and 0.12 at `low`."""
    import torch

    kernel = pixels.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([kernel, kernel.T])[:, None]
    n, _, height, width = pixels.shape
    padded = torch.nn.functional.pad(255 * pixels, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    slopes = torch.nn.functional.conv2d(padded, kernels).abs().sum(dim=1).view(n, 3, height, width)
    steepness = max(abs(high - low) / 4, 1.0)
    return torch.sigmoid((slopes.amax(dim=1) - (low + high) / 2) / steepness)


def soft_f1(probability: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """F1 of probabilities [H, W] and a bool map [H, W]; 1 if both are empty."""
    total = probability.sum() + given.sum()
    return 2.0 * (probability * given).sum() / total if bool(total > 0) else 1.0 + probability.sum()


def soft_mean_iou(logits: torch.Tensor, given: torch.Tensor, ignored: int) -> torch.Tensor:
    """Mean IoU over the classes of `given` int [H, W] of logits [C, H, W], leaving out pixels of class `ignored`."""

    counts = given != ignored
    classes = given[counts].unique()
    chance = logits.softmax(dim=0)[classes] * counts
    true = (given[None] == classes[:, None, None]) & counts
    both = (chance * true).sum(dim=(1, 2))
    return (both / (chance.sum(dim=(1, 2)) + true.sum(dim=(1, 2)) - both)).mean()


def depth_agreement(depth: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """1 - RMSE of two maps [H, W], each brought to 0..1 first; a flat map is all 0."""

    def unit(values: torch.Tensor) -> torch.Tensor:
        values = values - values.min()
        most = values.max()
        return values / most if bool(most > 0) else values

    squares = (unit(depth) - unit(given)) ** 2
    return 1.0 - (squares.mean() + 1e-12).sqrt()  # the root has no slope at 0


def with_slope_of(soft: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The number `value` with the gradient of `soft` (straight-through)."""
    return soft + (value - soft).detach()
