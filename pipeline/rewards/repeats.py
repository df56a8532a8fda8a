"""How sure a reward is of its scores: the same takes scored again, as slightly shifted pictures.

A reward that knows what it sees hardly notices a shift of a few pixels (and, on videos, other frames of the same
segments). The variance of a take's scores is its uncertainty, which `pipeline.rl.signals.group_relative` turns into a
weight (Ctrl-U, arXiv 2410.11236, does so with two predictions of one reward network under neighbouring noise).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pipeline.core.types import Media, RewardScores

SHIFT = 32  # a picture is shifted by up to its side / SHIFT pixels, and by one at least


def shifted(media: Media, seed: int) -> Media:
    """All frames of all takes moved by one random offset; the border repeats its edge, so the size stays."""
    height, width = media.frames.shape[2:4]
    rng = np.random.default_rng(seed)
    far_y, far_x = max(1, height // SHIFT), max(1, width // SHIFT)
    dy, dx = 0, 0
    while dy == dx == 0:
        dy, dx = int(rng.integers(-far_y, far_y + 1)), int(rng.integers(-far_x, far_x + 1))
    rows = np.clip(np.arange(height) + dy, 0, height - 1)
    columns = np.clip(np.arange(width) + dx, 0, width - 1)
    return Media(frames=media.frames[:, :, rows[:, None], columns], fps=media.fps)


def score_repeatedly(
    score: Callable[[Media, int | None], RewardScores], media: Media, seed: int | None, repeats: int
) -> RewardScores:
    """`score(media, seed)` of the takes as they are and of `repeats - 1` shifted copies: mean, and variance (n - 1).

    `seed` None (evaluation): once, unshifted. Segments and parts are those of the unshifted takes.
    """
    first = score(media, seed)
    if seed is None or repeats == 1:
        return first
    values, seconds = [first.values.astype(np.float64)], first.seconds
    for number in range(1, repeats):
        again = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        other = score(shifted(media, again), again)
        values.append(other.values.astype(np.float64))
        seconds += other.seconds
    variance = np.var(values, axis=0, ddof=1)
    return replace(
        first,
        values=np.mean(values, axis=0).astype(np.float32),
        variance=variance.astype(np.float32),
        parts={**first.parts, "spread": np.sqrt(variance).astype(np.float32)},
        seconds=seconds,
    )
