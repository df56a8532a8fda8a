"""JPEG size as a reward: no model, no prompt. Compressible pictures are smooth, incompressible ones detailed."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from pipeline.config.messages import show
from pipeline.core.errors import ConfigError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register


def jpeg_kilobytes(frame: np.ndarray, quality: int) -> float:
    """Size of uint8 [H, W, 3] as JPEG, in kB (1000 bytes)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=quality)
    return buffer.tell() / 1000.0


class _JpegSize(Scorer):
    reads = "frame"
    gradient_note = "a file's size has no slope; use your own function that takes pixels, such as one of |dx| + |dy|"
    sign: float

    def __init__(self, quality: int = 95, scale: float = 1.0) -> None:
        """`quality`: of the JPEG, 1..95. `scale`: kB that count as 1 (flow_grpo: 500)."""
        if not isinstance(quality, int) or not 1 <= quality <= 95:
            raise ConfigError(f"quality: found {show(quality)}; expected a whole number from 1 to 95")
        if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise ConfigError(f"scale: found {show(scale)}; expected a number above 0")
        self.quality, self.scale = quality, float(scale)

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        sizes = [jpeg_kilobytes(frame, self.quality) for frame in media.frames[:, 0]]
        return self.sign * np.asarray(sizes, dtype=np.float32) / self.scale


@register("jpeg_compressibility")
class JpegCompressibility(_JpegSize):
    """Minus the kB of the picture as JPEG (quality 95): higher is smoother."""

    sign = -1.0


@register("jpeg_incompressibility")
class JpegIncompressibility(_JpegSize):
    """The kB of the picture as JPEG (quality 95): higher is more detailed."""

    sign = 1.0
