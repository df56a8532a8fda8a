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


def to_pixels(output: Any, takes: int) -> torch.Tensor:
    """As `to_floats`, for an output of torch tensors ("pt"), whose gradients pass: float32 [K, F, 3, H, W] in 0..1."""
    values = next((v for v in (getattr(output, name, None) for name in _PICTURES) if v is not None), None)
    if values is None:
        values = output[0] if isinstance(output, (tuple, list)) else output
    tensor = _tensor(values)
    if tensor.ndim == 6 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim == 4 and tensor.shape[0] != takes:
        tensor = tensor[None]
    if tensor.ndim == 4:
        tensor = tensor[:, None]
    if tensor.ndim != 5 or tensor.shape[0] != takes:
        raise RushesError(
            f"the generator's output has shape {list(tensor.shape)} for {takes} takes; pictures are needed"
        )
    axis = next((axis for axis in (2, 1, 4) if tensor.shape[axis] in (1, 3, 4)), None)
    if axis is None:
        raise RushesError(f"the generator's output has shape {list(tensor.shape)}, in which no axis is colour")
    tensor = tensor.movedim(axis, 2)
    return (tensor.expand(-1, -1, 3, -1, -1) if tensor.shape[2] == 1 else tensor[:, :, :3]).float()


def to_pictures(decoded: torch.Tensor, takes: int) -> torch.Tensor:
    """What a VAE decodes, in -1..1, [K, 3, F, H, W] or [K x F, 3, H, W] -> [K, F, 3, H, W] in 0..1, as pipelines do.

    Raises ValueError where it is neither.
    """
    if decoded.ndim not in (4, 5) or decoded.shape[1] != 3 or decoded.shape[0] % takes:
        raise ValueError(f"shape {list(decoded.shape)} for {takes} takes")
    frames = decoded.transpose(1, 2) if decoded.ndim == 5 else decoded.unflatten(0, (takes, -1))
    return (frames.float() * 0.5 + 0.5).clamp(0.0, 1.0)


def _tensor(values: Any) -> torch.Tensor:
    if isinstance(values, (list, tuple)):
        return torch.stack([_tensor(value) for value in values])
    return values if isinstance(values, torch.Tensor) else torch.as_tensor(values)


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
