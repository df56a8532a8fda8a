"""Canny edges as OpenCV's `cv2.Canny(picture, low, high)` finds them, in scipy."""

from __future__ import annotations

import numpy as np


def canny(frame: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 [H, W, 3] -> bool [H, W]. Thresholds apply to |dx| + |dy| of the 3 x 3 Sobel operator, not smoothed."""
    from scipy.ndimage import label, sobel

    channels = frame.astype(np.int32).transpose(2, 0, 1)  # one by one: sobel would smooth across them
    dx, dy = (np.stack([sobel(c, axis=axis, mode="nearest") for c in channels], -1) for axis in (1, 0))
    strongest = (np.abs(dx) + np.abs(dy)).argmax(axis=-1)[..., None]  # each pixel from its strongest channel
    dx, dy = (np.take_along_axis(d, strongest, axis=-1)[..., 0] for d in (dx, dy))
    magnitude = np.abs(dx) + np.abs(dy)
    around = np.pad(magnitude, 1)

    def neighbour(row: int, column: int) -> np.ndarray:
        return around[1 + row : around.shape[0] - 1 + row, 1 + column : around.shape[1] - 1 + column]

    slope = np.abs(dy) / np.maximum(np.abs(dx), 1e-9)
    same_sign = (dx < 0) == (dy < 0)
    ridge = np.where(
        slope < np.tan(np.pi / 8),  # the gradient points sideways
        (magnitude > neighbour(0, -1)) & (magnitude >= neighbour(0, 1)),
        np.where(
            slope > np.tan(3 * np.pi / 8),  # up or down
            (magnitude > neighbour(-1, 0)) & (magnitude >= neighbour(1, 0)),
            np.where(
                same_sign,
                (magnitude > neighbour(-1, -1)) & (magnitude > neighbour(1, 1)),
                (magnitude > neighbour(-1, 1)) & (magnitude > neighbour(1, -1)),
            ),
        ),
    )
    weak = ridge & (magnitude > low)
    pieces, _ = label(weak, structure=np.ones((3, 3)))
    kept = np.unique(pieces[weak & (magnitude > high)])
    return np.isin(pieces, kept[kept > 0])
