"""The preprocessing of a transformers checkpoint on pixels with gradients: a resize and a normalisation, checked
against the checkpoint's own image processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.errors import RewardError
from pipeline.rewards.models.images import normalise, resize_pixels

if TYPE_CHECKING:
    import torch

_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers of its filters
_LEVELS = 3.0  # of 255: PIL rounds to 8 bits, torch does not


class PixelProcessor:
    """What `processor` (on PIL) does to 8-bit pictures, for float pixels."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.sizes: dict[tuple[int, int], tuple[int, int]] = {}

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """float [N, 3, H, W] from 0 to 1 -> the model's input, with gradients. Raises `RewardError` where the processor
        does more than resize and normalise."""
        shape = (pixels.shape[2], pixels.shape[3])
        if shape not in self.sizes:
            self.sizes[shape] = self._checked_size(shape)
        return self._prepared(pixels, self.sizes[shape])

    def _prepared(self, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        settings = self.processor
        x = resize_pixels(pixels, *size, mode=_MODES.get(getattr(settings, "resample", None) or 2, "bicubic"))
        if getattr(settings, "do_rescale", True):
            x = x * (255 * (getattr(settings, "rescale_factor", None) or 1 / 255))
        if getattr(settings, "do_normalize", False):
            x = normalise(x, settings.image_mean, settings.image_std)
        return x

    def _checked_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the model's input for pictures of `shape`, found on a smooth picture."""
        import torch

        coarse = torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(0))
        picture = torch.nn.functional.interpolate(coarse, shape, mode="bilinear", align_corners=True)
        frame = (picture[0].permute(1, 2, 0) * 255).round().byte().numpy()
        expected = self.processor(images=[np.ascontiguousarray(frame)], return_tensors="pt")["pixel_values"].float()
        size = (expected.shape[2], expected.shape[3])
        gap = (self._prepared(torch.from_numpy(frame).permute(2, 0, 1)[None] / 255, size) - expected).abs().max()
        if float(gap) > _LEVELS / 255 * max(1.0, float(expected.max() - expected.min())):
            raise RewardError(
                f"{type(self.processor).__name__} does more than resize and normalise (its result differs by "
                f"{float(gap):.2g}), so it has no gradient; use a checkpoint whose processor does"
            )
        return size
