"""Scores with gradients against the server's scores and against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.core.types import Media, PromptItem
from pipeline.rewards.runner import RewardRunner


def as_pixels(media: Media) -> torch.Tensor:
    """[K, F, 3, H, W] from 0 to 1 that require gradients."""
    return (torch.from_numpy(media.frames).permute(0, 1, 4, 2, 3).float() / 255).requires_grad_()


def finite_difference(
    function: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, eps: float = 0.02
) -> tuple[float, float]:
    """(slope by central differences, slope from the gradient) of a scalar function, in the gradient's direction with
    some noise. `eps`: length of the step, over all pixels."""
    (gradient,) = torch.autograd.grad(function(pixels), pixels)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    direction = gradient / gradient.norm() + 0.3 * noise / noise.norm()
    with torch.no_grad():
        slope = (function(pixels + eps * direction) - function(pixels - eps * direction)) / (2 * eps)
    return float(slope), float((gradient * direction).sum())


def gap_to_server(runner: RewardRunner, media: Media, prompts: Sequence[PromptItem]) -> float:
    """Largest difference of the two scores of a take."""
    with torch.no_grad():
        learner = runner.gradient(as_pixels(media), prompts, None, fps=media.fps).numpy()
    return float(np.abs(runner.run(media, prompts, None).values - learner).max())


def check_slope(runner: RewardRunner, media: Media, prompts: Sequence[PromptItem], eps: float = 0.02) -> None:
    """The gradient of every take's score is that of finite differences within 1 %, and no take's is 0."""
    weights = torch.arange(1.0, len(prompts) + 1)
    pixels = as_pixels(media)
    slope, product = finite_difference(
        lambda x: (runner.gradient(x, prompts, None, fps=media.fps) * weights).sum(), pixels, eps
    )
    assert abs(slope - product) < 0.01 * abs(product) and product > 0, (slope, product)
    runner.gradient(pixels, prompts, None, fps=media.fps).sum().backward()
    assert pixels.grad is not None and bool((pixels.grad.flatten(1).abs().amax(dim=1) > 0).all())
