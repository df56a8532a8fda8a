"""Guards: what held-out takes look like, measured without a model, so that a hacked reward shows.

`measure` looks at each take by itself, where it was drawn. `across` compares takes by their descriptors: with other
takes of their prompt, with those of other prompts, and with the same prompt and seed before training. `GUARDS` says how
far each measurement may move from where it was before training (`pipeline.runs.verdict` decides).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.core.types import Media, TakeMeasurements

_PICTURES = 4  # frames of a clip that are measured as pictures, evenly spaced
_GRID = 8  # a descriptor has 8 x 8 cells a frame
_DESCRIBED = 4  # frames of a clip in its descriptor
_SHORT_SIDE = 64  # pixels at which frames are compared with each other
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_IMMERKAER = ((1, -2, 1), (-2, 4, -2), (1, -2, 1))
_LAPLACE = ((0, 1, 0), (1, -4, 1), (0, 1, 0))
_UNIFORM = 0.02  # standard deviation of every channel (0..1) below which a picture shows nothing
_STILL = 0.01  # change of every descriptor cell (0..1) below which two frames are the same
_DUPLICATE = 0.02  # rms difference of descriptors (0..1) below which two takes are the same


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How far a measurement's mean over held-out prompts may move from where it was before training.

    `factor`: between start / tolerance and start x tolerance. `offset`: the tolerance below or above the start.
    `limit`: at most the tolerance, whatever it was. A move in a direction that is not watched, or smaller than `least`,
    is never suspect.
    """

    about: str
    kind: Literal["factor", "offset", "limit"]
    tolerance: float  # default of evaluation.guards.NAME
    falls: bool = True
    rises: bool = True
    least: float = 0.0  # of the measurement's unit

    def allowed(self, start: float, tolerance: float) -> tuple[float, float]:
        """(lowest, highest) mean that is not suspect, given the mean before training."""
        if self.kind == "factor":
            low, high = min(start / tolerance, start - self.least), max(start * tolerance, start + self.least)
        elif self.kind == "offset":
            low, high = start - tolerance, start + tolerance
        else:
            low, high = -np.inf, tolerance
        return (low if self.falls else -np.inf), (high if self.rises else np.inf)


GUARDS: dict[str, Guard] = {
    "brightness": Guard(about="Mean luma, 0 to 1.", kind="offset", tolerance=0.12),
    "contrast": Guard(about="Standard deviation of a picture's luma.", kind="factor", tolerance=2.0, least=0.03),
    "saturation": Guard(about="Mean of max(R, G, B) - min(R, G, B), 0 to 1.", kind="factor", tolerance=2.0, least=0.05),
    "clipping": Guard(
        about="Share of values that are black or full (up to 2, from 253).", kind="offset", tolerance=0.15, falls=False
    ),
    "sharpness": Guard(about="Standard deviation of the luma's Laplacian.", kind="factor", tolerance=2.0, least=0.01),
    "noise": Guard(
        about="Standard deviation of the noise after Immerkaer (1996).", kind="factor", tolerance=2.0, falls=False,
        least=0.01,
    ),
    "uniform": Guard(about="Share of pictures that show nothing.", kind="offset", tolerance=0.05, falls=False),
    "duplicates": Guard(
        about="Share of takes that equal another one but for small details.", kind="offset", tolerance=0.1, falls=False
    ),
    "diversity": Guard(about="Mean distance of a prompt's takes.", kind="factor", tolerance=2.0, rises=False),
    "variety": Guard(about="Mean distance of takes of different prompts.", kind="factor", tolerance=1.5, rises=False),
    "distance": Guard(
        about="Distance from the take before training; 1: as far as takes of different prompts were from each other.",
        kind="limit", tolerance=1.0,
    ),
    "motion": Guard(about="Mean change of luma from frame to frame.", kind="factor", tolerance=2.0, least=0.005),
    "smoothness": Guard(
        about="1 - change of the motion / motion, 1: steady, 0: each change is taken back.", kind="factor",
        tolerance=1.5, rises=False,
    ),
    "flicker": Guard(
        about="Mean change of a frame's brightness.", kind="factor", tolerance=2.0, falls=False, least=0.01
    ),
    "frozen": Guard(
        about="Share of frames that equal the frame before them.", kind="offset", tolerance=0.15, falls=False
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- a take by itself


def measure(media: Media) -> TakeMeasurements:
    """Each take's measurements (those of motion of clips alone) and its descriptor."""
    rows, descriptors = [], []
    for frames in media.frames:
        pictures = [_picture(frame) for frame in frames[_evenly(len(frames), _PICTURES)]]
        row = {name: float(np.mean([picture[name] for picture in pictures])) for name in pictures[0]}
        if len(frames) > 1:
            row |= _motion(np.stack([_reduced(frame) for frame in frames]))
        rows.append(row)
        cells = [_cells(frame.astype(np.float32)) for frame in frames[_evenly(len(frames), _DESCRIBED)]]
        descriptors.append(np.rint(cells).astype(np.uint8).ravel())
    values = {name: np.array([row[name] for row in rows], np.float32) for name in rows[0]}
    return TakeMeasurements(values=values, descriptors=np.stack(descriptors))


def _evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices, evenly spaced, first and last among them."""
    return np.unique(np.rint(np.linspace(0, count - 1, min(count, most))).astype(int))


def _picture(frame: np.ndarray) -> dict[str, float]:
    """Of uint8 [H, W, 3]."""
    values = frame.astype(np.float32) / 255
    luma = values @ _LUMA
    result = {
        "brightness": luma.mean(),
        "contrast": luma.std(),
        "saturation": (values.max(axis=-1) - values.min(axis=-1)).mean(),
        "clipping": ((frame <= 2) | (frame >= 253)).mean(),
        "uniform": values.std(axis=(0, 1)).max() < _UNIFORM,
    }
    if min(luma.shape) >= 3:
        result["sharpness"] = _filtered(luma, _LAPLACE).std()
        # Fast noise variance estimation (Immerkaer, 1996), eq. 6: sigma = sqrt(pi / 2) / 6 * mean |I * N|.
        result["noise"] = np.sqrt(np.pi / 2) / 6 * np.abs(_filtered(luma, _IMMERKAER)).mean()
    return {name: float(value) for name, value in result.items()}


def _filtered(picture: np.ndarray, kernel: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """[H, W] -> [H - 2, W - 2], correlated with a 3 x 3 kernel."""
    height, width = picture.shape[0] - 2, picture.shape[1] - 2
    total = np.zeros((height, width), np.float32)
    for y, row in enumerate(kernel):
        for x, weight in enumerate(row):
            if weight:
                total += weight * picture[y : y + height, x : x + width]
    return total


def _motion(frames: np.ndarray) -> dict[str, float]:
    """Of a clip [F, h, w, 3], 0 to 255, with two frames or more."""
    luma = frames @ (_LUMA / 255)
    change = np.diff(luma, axis=0)
    motion = np.abs(change).mean()
    cells = np.stack([_cells(frame) for frame in frames]) / 255
    result = {
        "motion": motion,
        "flicker": np.abs(np.diff(luma.mean(axis=(1, 2)))).mean(),
        "frozen": (np.abs(np.diff(cells, axis=0)).max(axis=(1, 2, 3)) < _STILL).mean(),
    }
    if len(frames) > 2:
        moved = np.diff(cells, axis=0)  # of coarse cells, which an edge takes several frames to pass
        total = np.abs(moved).mean()
        result["smoothness"] = 1 - np.abs(np.diff(moved, axis=0)).mean() / (2 * total) if total > 1e-4 else 1.0
    return {name: float(value) for name, value in result.items()}


def _reduced(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [h, w, 3]: means of square blocks, so that the short side has about `_SHORT_SIDE`."""
    factor = max(1, min(frame.shape[:2]) // _SHORT_SIDE)
    height, width = (size // factor for size in frame.shape[:2])
    blocks = frame[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def _cells(frame: np.ndarray) -> np.ndarray:
    """float32 [H, W, 3] -> [g, g, 3]: means of a grid of cells (fewer where there are fewer pixels)."""
    for axis in (0, 1):
        size = frame.shape[axis]
        edges = np.linspace(0, size, min(_GRID, size) + 1).astype(int)
        shape = [1, 1, 1]
        shape[axis] = -1
        frame = np.add.reduceat(frame, edges[:-1], axis=axis) / np.diff(edges).reshape(shape).astype(np.float32)
    return frame


# ------------------------------------------------------------------------------------------------- takes compared


def across(descriptors: np.ndarray, prompts: np.ndarray, start: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Measurements [N] that compare takes: `descriptors` uint8 [N, D], their prompts' indices [N], and the descriptors
    of the same takes before training (None: these are they, or they are not known). NaN: nothing to compare with."""
    apart = _distances(descriptors, descriptors)
    same = prompts[:, None] == prompts[None, :]
    itself = np.eye(len(prompts), dtype=bool)
    result = {"diversity": _mean_where(apart, same & ~itself), "variety": _mean_where(apart, ~same)}
    if len(prompts) > 1:
        result["duplicates"] = (np.where(itself, np.inf, apart).min(axis=1) < _DUPLICATE).astype(np.float32)
    if start is not None and start.shape == descriptors.shape:
        typical = np.nanmean(_mean_where(_distances(start, start), ~same)) if (~same).any() else np.nan
        moved = np.sqrt(np.square(descriptors.astype(np.float32) - start.astype(np.float32)).mean(axis=1)) / 255
        result["distance"] = (moved / typical).astype(np.float32) if typical > 0 else np.full(len(moved), np.nan)
    return {name: values for name, values in result.items() if not np.isnan(values).all()}


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Root mean squared differences [N, M], 0 to 1, of uint8 [N, D] and [M, D]."""
    a, b = (each.astype(np.float32) / 255 for each in (first, second))
    squared = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None, :] - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0) / a.shape[1])


def _mean_where(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Means of each row's chosen values, NaN where there are none."""
    count = where.sum(axis=1)
    total = np.where(where, values, 0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def merged(measurements: list[TakeMeasurements]) -> TakeMeasurements:
    """Of takes drawn in several calls, in order."""
    values: Mapping[str, np.ndarray] = measurements[0].values
    return TakeMeasurements(
        values={name: np.concatenate([each.values[name] for each in measurements]) for name in values},
        descriptors=np.concatenate([each.descriptors for each in measurements]),
    )
