"""Dense optical flow between two small grey frames: pyramidal Lucas-Kanade with Gaussian windows, in scipy.

Enough to tell how much a clip moves and whether it moves steadily; no model, deterministic, milliseconds at 128 pixels.
"""

from __future__ import annotations

import numpy as np


def grey_frames(frames: np.ndarray, short_side: int) -> np.ndarray:
    """uint8 [F, H, W, 3] -> float32 luma [F, h, w] in 0..255 with h or w = `short_side` (never enlarged)."""
    from PIL import Image

    height, width = frames.shape[1:3]
    scale = min(1.0, short_side / min(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pictures = [Image.fromarray(f).convert("L") for f in frames]
    return np.stack([np.asarray(p.resize(size, Image.Resampling.BOX), dtype=np.float32) for p in pictures])


def warp(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """image(x + flow(x)), bilinear, edges repeated. image [h, w], flow [2, h, w] as (dy, dx) in pixels."""
    from scipy.ndimage import map_coordinates

    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    return map_coordinates(image, [rows + flow[0], columns + flow[1]], order=1, mode="nearest")


def optical_flow(first: np.ndarray, second: np.ndarray, window: float = 2.5, rounds: int = 3) -> np.ndarray:
    """Flow [2, h, w] (dy, dx in pixels) such that second(x + flow(x)) = first(x); zero where nothing has texture."""
    from scipy.ndimage import gaussian_filter, zoom

    levels = [(first.astype(np.float32), second.astype(np.float32))]
    while min(levels[-1][0].shape) >= 32:
        levels.append(tuple(gaussian_filter(image, 1.0)[::2, ::2] for image in levels[-1]))
    flow = np.zeros((2, *levels[-1][0].shape), np.float32)
    for a, b in reversed(levels):
        if flow.shape[1:] != a.shape:
            factors = (1, a.shape[0] / flow.shape[1], a.shape[1] / flow.shape[2])
            flow = 2.0 * zoom(flow, factors, order=1, mode="nearest", grid_mode=True)
        gy, gx = np.gradient(gaussian_filter(a, 0.7)) if min(a.shape) > 1 else (np.zeros_like(a), np.zeros_like(a))
        blur = [gaussian_filter(p, window) for p in (gy * gy, gy * gx, gx * gx)]
        yy, yx, xx = blur
        ridge = 1.0  # grey levels squared: flat areas stay where the coarser level put them
        determinant = (yy + ridge) * (xx + ridge) - yx * yx
        for _ in range(rounds):
            difference = gaussian_filter(a, 0.7) - warp(gaussian_filter(b, 0.7), flow)
            ty, tx = gaussian_filter(gy * difference, window), gaussian_filter(gx * difference, window)
            step = np.stack([(xx + ridge) * ty - yx * tx, (yy + ridge) * tx - yx * ty]) / determinant
            flow = flow + np.clip(step, -2.0, 2.0)
    return flow
