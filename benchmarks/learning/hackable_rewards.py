"""Rewards that are easily hacked, for `benchmarks.learning.hacks`. Frames uint8 [F, H, W, 3]."""

import numpy as np


def brightness(frames, prompt):
    """Mean of all values, 0 to 1: a white picture is best."""
    return frames.mean() / 255


def redness(frames, prompt):
    """Red without green and blue, -1 to 1."""
    red, green, blue = frames.mean(axis=(0, 1, 2)) / 255
    return red - (green + blue) / 2


def any_motion(frames, prompt):
    """Mean change from frame to frame, 0 to 1, whatever moves: flicker is best."""
    return np.abs(np.diff(frames.astype(np.float32), axis=0)).mean() / 255


any_motion.reads = "video"
