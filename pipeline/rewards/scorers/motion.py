"""Motion of a clip without a model: how much moves, how steadily, and how much it flickers.

They read the whole clip. The first rewards motion and the other two punish unsteady pictures, which a still clip
satisfies best: use them together, or beside a reward that needs motion.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from pipeline.config.messages import show
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.optical_flow import grey_frames, optical_flow, warp
from pipeline.rewards.models.pretrained import check_number


class _ClipScorer(Scorer):
    reads = "video"
    gradient_note = "it solves for the optical flow; use video_align with aspect: motion"
    needs_clip = True
    least = 2  # frames

    def __init__(self, short_side: int = 96) -> None:
        """`short_side`: pixels of the short side at which frames are compared (smaller is faster)."""
        if not isinstance(short_side, int) or not 8 <= short_side <= 1024:
            raise ConfigError(f"short_side: found {show(short_side)}; expected a whole number from 8 to 1024")
        self.short_side = short_side

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        frames = media.frames.shape[1]
        if frames < self.least:
            raise RewardError(f"needs clips of at least {self.least} frames, got {frames}")
        if not media.fps > 0:
            raise RewardError(f"needs the clip's frame rate, got fps = {media.fps}")
        greys = [grey_frames(take, self.short_side) for take in media.frames]
        return np.asarray([self.rate(grey, media.fps) for grey in greys], dtype=np.float32)

    @abstractmethod
    def rate(self, grey: np.ndarray, fps: float) -> float:
        """grey float32 [F, h, w] -> the clip's score."""


@register("motion_dynamics")
class MotionDynamics(_ClipScorer):
    """Speed of the fastest 5 % of the picture, in short sides per second (0: nothing moves)."""

    def __init__(self, fraction: float = 0.05, cap: float = 10.0, short_side: int = 96) -> None:
        """`fraction` of the pixels that counts, fastest first. `cap`: faster than this is no better."""
        super().__init__(short_side)
        self.fraction = check_number("fraction", fraction, 1e-4, 1.0)
        self.cap = check_number("cap", cap, 0.0)

    def rate(self, grey: np.ndarray, fps: float) -> float:
        speeds = []
        for first, second in zip(grey[:-1], grey[1:], strict=True):
            magnitude = np.sort(np.hypot(*optical_flow(first, second)).ravel())[::-1]
            speeds.append(magnitude[: max(1, int(self.fraction * magnitude.size))].mean())
        return min(self.cap, float(np.mean(speeds)) * fps / min(grey.shape[1:]))


@register("motion_smoothness")
class MotionSmoothness(_ClipScorer):
    """1 - mean error of each frame against its neighbours' half-way picture along the flow (0 to 1, 1: steady)."""

    least = 3

    def rate(self, grey: np.ndarray, fps: float) -> float:
        errors = []
        for before, middle, after in zip(grey[:-2], grey[1:-1], grey[2:], strict=True):
            # the motion is taken to pass each pixel of the middle frame at the same speed before and after
            half = 0.5 * optical_flow(before, after)
            there = warp(half[0], -half), warp(half[1], -half)
            expected = 0.5 * (warp(before, -np.stack(there)) + warp(after, np.stack(there)))
            errors.append(np.abs(expected - middle).mean())
        return 1.0 - float(np.mean(errors)) / 255.0


@register("flicker")
class Flicker(_ClipScorer):
    """1 - mean change from frame to frame, motion taken out first (0 to 1, 1: no flicker)."""

    def __init__(self, compensate: bool = True, short_side: int = 96) -> None:
        """`compensate` False counts motion as flicker too: VBench's plain mean absolute difference."""
        super().__init__(short_side)
        if not isinstance(compensate, bool):
            raise ConfigError(f"compensate: found {show(compensate)}; expected true or false")
        self.compensate = compensate

    def rate(self, grey: np.ndarray, fps: float) -> float:
        changes = []
        for first, second in zip(grey[:-1], grey[1:], strict=True):
            arrived = warp(second, optical_flow(first, second)) if self.compensate else second
            changes.append(np.abs(arrived - first).mean())
        return 1.0 - float(np.mean(changes)) / 255.0
