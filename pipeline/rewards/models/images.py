"""Preprocessing of the CLIP-like reward models: resize by the bicubic filter, crop or pad to a square, normalise.

Frames of 8 bits are resized by PIL and keep 8 bits until after the resize, as in the official code of every model here.
Pixels with gradients are resized by torch's antialiased bicubic filter, which is the same one without the rounding: the
two differ by about 1 / 255 at most, and not at all where nothing is resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from pipeline.core.errors import RewardError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Frames: TypeAlias = "np.ndarray | torch.Tensor"
"""Pictures: uint8 [N, H, W, 3], or float [N, 3, H, W] from 0 to 1 with gradients."""

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """crop: short side to `resize` (default `size`), then the central square. letterbox: long side to `size`, black
    bars. stretch: straight to the square."""

    size: int = 224
    fit: Literal["crop", "letterbox", "stretch"] = "crop"
    resize: int | None = None  # crop only: the short side before cropping
    odd: Literal["floor", "round"] = "floor"  # half an odd margin: floor as transformers, round as torchvision
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


def place(height: int, width: int, p: Preprocess) -> tuple[int, int, int, int]:
    """(new height, new width, top, left): the resized picture and where the square starts in it (negative: bars)."""
    if p.fit == "stretch":
        return p.size, p.size, 0, 0
    if p.fit == "letterbox":
        scale = p.size / max(height, width)
        new_h, new_w = max(1, round(height * scale)), max(1, round(width * scale))
        return new_h, new_w, -((p.size - new_h) // 2), -((p.size - new_w) // 2)
    short = p.resize or p.size
    if height <= width:
        new_h, new_w = short, int(short * width / height)
    else:
        new_h, new_w = int(short * height / width), short
    half = (lambda margin: margin // 2) if p.odd == "floor" else (lambda margin: int(round(margin / 2.0)))
    return new_h, new_w, half(new_h - p.size), half(new_w - p.size)


def preprocess(frames: Frames, p: Preprocess) -> torch.Tensor:
    """Frames -> normalised float32 [N, 3, S, S]. Raises `RewardError` for values that are no pixels."""
    import torch

    if isinstance(frames, torch.Tensor):
        pixels = _resized_pixels(frames.float(), p)
    else:
        pixels = torch.from_numpy(_resized(frames, p)).permute(0, 3, 1, 2).float() / 255.0
    return normalise(pixels, p.mean, p.std)


def normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(pixels [N, 3, H, W] - mean) / std of each channel."""
    means, stds = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    return (pixels - means) / stds


def _resized_pixels(pixels: torch.Tensor, p: Preprocess) -> torch.Tensor:
    """[N, 3, H, W] -> [N, 3, S, S], differentiable."""
    import torch

    new_h, new_w, top, left = place(pixels.shape[2], pixels.shape[3], p)
    pixels = resize_pixels(pixels, new_h, new_w)
    if p.fit == "crop":
        return pixels[:, :, top : top + p.size, left : left + p.size]
    return torch.nn.functional.pad(pixels, (-left, p.size - new_w + left, -top, p.size - new_h + top))


def resize_pixels(pixels: torch.Tensor, height: int, width: int, mode: str = "bicubic") -> torch.Tensor:
    """float [N, 3, H, W] from 0 to 1, resized with antialiasing (`mode` bicubic or bilinear): first its rows, then its
    columns, overshoots cut off after each, as PIL does it."""
    import torch

    for size in ((pixels.shape[2], width), (height, width)):
        if pixels.shape[2:] != size:
            pixels = torch.nn.functional.interpolate(pixels, size, mode=mode, antialias=True).clamp(0.0, 1.0)
    return pixels


def _resized(frames: np.ndarray, p: Preprocess) -> np.ndarray:
    """uint8 [N, S, S, 3], by PIL's bicubic filter."""
    from PIL import Image

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise RewardError(f"frames must be uint8 [N, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    new_h, new_w, top, left = place(frames.shape[1], frames.shape[2], p)
    out = np.zeros((len(frames), p.size, p.size, 3), dtype=np.uint8)
    for target, frame in zip(out, frames, strict=True):
        if frame.shape[:2] != (new_h, new_w):
            frame = np.asarray(Image.fromarray(frame).resize((new_w, new_h), Image.Resampling.BICUBIC))
        if p.fit == "crop":
            target[:] = frame[top : top + p.size, left : left + p.size]
        else:
            target[-top : -top + new_h, -left : -left + new_w] = frame
    return out


def shrunk(frame: np.ndarray, max_side: int | None = None) -> Image:
    """uint8 [H, W, 3] as a PIL picture whose long side is `max_side` pixels at most."""
    from PIL import Image

    picture = Image.fromarray(frame)
    if max_side and max(picture.size) > max_side:
        scale = max_side / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return picture
