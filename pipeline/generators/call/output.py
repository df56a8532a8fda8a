"""A pipeline's output as pictures: float32 frames, and uint8 frames for the rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.core.errors import RushesError

_PICTURES = ("frames", "images", "videos", "video", "image", "rgb")  # names of the pictures in a pipeline's output


def to_floats(output: Any, takes: int) -> np.ndarray:
    """A pipeline's output -> float32 [K, F, H, W, 3] in [0, 1]. Raises RushesError where it is no picture, or NaN."""
    values = next((v for v in (getattr(output, name, None) for name in _PICTURES) if v is not None), None)
    if values is None:
        values = output[0] if isinstance(output, (tuple, list)) else output
    if isinstance(values, dict):  # diffusers' outputs are
        raise RushesError(f"the generator's output is a {type(values).__name__} of {', '.join(values)}: no pictures")
    array = _array(values)
    if array.ndim == 6 and array.shape[0] == 1:  # [1, K, F, ...] of pipelines that nest their batches
        array = array[0]
    if array.ndim == 4 and array.shape[0] != takes:  # one take: [F, ...]
        array = array[None]
    if array.ndim == 4:  # images
        array = array[:, None]
    if array.ndim != 5 or array.shape[0] != takes:
        raise RushesError(
            f"the generator's output has shape {list(array.shape)} for {takes} takes; pictures or videos are needed"
        )
    if array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 2 if array.shape[2] in (1, 3, 4) else 1, -1)
    if array.shape[-1] not in (1, 3, 4):
        raise RushesError(f"the generator's output has shape {list(array.shape)}, in which no axis is colour")
    array = np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array[..., :3]
    if not np.isfinite(array).all():
        raise RushesError("the generator's output has NaN or infinity; a lower learning rate or float32 may help")
    return array


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return values.detach().float().cpu().numpy()
    if isinstance(values, (list, tuple)):
        return np.stack([_array(value) for value in values])
    array = np.asarray(values)
    return array.astype(np.float32) / 255.0 if array.dtype == np.uint8 else array.astype(np.float32)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] -> uint8, rounded to the nearest."""
    return np.rint(values.clip(0.0, 1.0) * 255.0).astype(np.uint8)
