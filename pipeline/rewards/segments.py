"""Any frame scorer as a video scorer: segments, and temporally attenuated weights (InstructVideo, SegVR and TAR).

A clip of F frames is split into S segments; n frames of each are scored, and

    R = (1/S) sum_s (1/n) sum_j  f(g_sj) r(frame g_sj),      f(g) = exp(-lambda * (16 / F) * |g - F // 2|).

lambda is stated for 16 frames and rescaled with the clip, otherwise 81 frames would reward a single one. With
`normalize` R is divided by the mean of the weights, so that it keeps the scorer's scale. lambda = 0 is the plain
segmental mean. Instead of the mean of all segments, `aggregate` may take the worst, or the best share of them.

In training the frames are drawn at random, the same for all takes of a group (else the picks' noise enters the
advantage); in evaluation they are the segments' centres.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.sections.rewards import SegmentsConfig
from pipeline.core.types import Media, PromptItem, RewardScores
from pipeline.rewards.base import ScorerCall

if TYPE_CHECKING:
    import torch

REFERENCE_FRAMES = 16  # the clip length for which lambda is stated


def segment_bounds(frames: int, segments: int) -> list[tuple[int, int]]:
    """[start, end) of each segment; a clip shorter than `segments` gets one segment per frame."""
    segments = min(segments, frames)
    edges = [i * frames // segments for i in range(segments + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def pick_frames(frames: int, segments: int, per_segment: int, seed: int | None) -> np.ndarray:
    """Frame indices int64 [S, n], sorted within a segment, no frame twice.

    `seed` None: evenly spaced around each segment's centre. n shrinks to the shortest segment.
    """
    bounds = segment_bounds(frames, segments)
    n = min(per_segment, min(end - start for start, end in bounds))
    if seed is None:
        picks = [[start + (2 * j + 1) * (end - start) // (2 * n) for j in range(n)] for start, end in bounds]
    else:
        rng = np.random.Generator(np.random.PCG64(seed))
        picks = [sorted(start + rng.choice(end - start, size=n, replace=False)) for start, end in bounds]
    return np.asarray(picks, dtype=np.int64)


def log_weights(picks: np.ndarray, frames: int, attenuation: float) -> np.ndarray:
    """log f(g), float64, same shape as `picks`."""
    return -attenuation * (REFERENCE_FRAMES / frames) * np.abs(picks - frames // 2).astype(np.float64)


def segment_weights(
    picks: np.ndarray, frames: int, attenuation: float, normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(weights of the frames within each segment [S, n], rows sum to 1; weights of the segments [S]), float64.

    A segment's value is the weighted mean of its frames. Its weight is the mean of their f, divided by the sum over
    the segments when normalised.
    """
    logs = log_weights(picks, frames, attenuation)
    within = np.exp(logs - logs.max(axis=1, keepdims=True))  # shifted: a far segment's weights must not underflow
    within /= within.sum(axis=1, keepdims=True)
    if normalize:
        shifted = np.exp(logs - logs.max()).mean(axis=1)
        return within, shifted / shifted.sum()
    return within, np.exp(logs).mean(axis=1)


def combine(
    frame_scores: np.ndarray,
    picks: np.ndarray,
    frames: int,
    attenuation: float,
    normalize: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """frame_scores [K, S, n] -> (score [K], segment values [K, S], segment weights [S]), float64.

    score = sum_s weight_s value_s, divided by S when not normalised. NaN frames (of logged parts) are left out; where
    all are NaN the result is NaN.
    """
    within, weights = segment_weights(picks, frames, attenuation, normalize)
    values = _mean(frame_scores.astype(np.float64), np.broadcast_to(within, frame_scores.shape))  # [K, S]
    if normalize:
        return _mean(values, np.broadcast_to(weights, values.shape)), values, weights
    present = ~np.isnan(values)
    total = np.where(present, values * weights, 0.0).sum(axis=1) / len(weights)
    return np.where(present.any(axis=1), total, np.nan), values, weights


def chosen_weights(values: np.ndarray, weights: np.ndarray, config: SegmentsConfig) -> tuple[np.ndarray, int]:
    """Which segments make up each take's score: values [K, S], weights [S] -> (weights [K, S], divisor), such that
    score = sum_s weight_s value_s / divisor. Segments that are not chosen weigh 0.

    `aggregate`: min, the worst segment; or a share p, the ceil(p S) best ones. Of these the weighted mean, or without
    `normalize` their sum of weight * value divided by their number. Attenuation decides between the chosen, so it does
    not matter to a single one that is normalised: a spoilt end counts as much as a spoilt middle.
    """
    if config.aggregate == "mean":
        return np.broadcast_to(weights, values.shape), 1 if config.normalize else len(weights)
    count = 1 if config.aggregate == "min" else int(np.ceil(round(float(config.aggregate) * values.shape[1], 9)))
    order = np.argsort(values if config.aggregate == "min" else -values, axis=1, kind="stable")[:, :count]
    chosen = np.zeros(values.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    shares = np.where(chosen, weights, 0.0)
    # A chosen segment far from the middle may weigh next to nothing; relative to the others chosen it still counts.
    scale = shares.max(axis=1, keepdims=True)
    shares = np.divide(shares, scale, out=chosen.astype(np.float64), where=scale > 0)
    if config.normalize:
        return shares / shares.sum(axis=1, keepdims=True), 1
    return shares * scale, count


def combine_tensors(frame_scores: torch.Tensor, picks: np.ndarray, frames: int, config: SegmentsConfig) -> torch.Tensor:
    """frame_scores [K, S, n] -> score [K], as `combine` and `chosen_weights` have it. The weights are constants, so a
    frame with weight 0, or in a segment that is not chosen, gets no gradient."""
    within, weights = segment_weights(picks, frames, config.attenuation, config.normalize)
    values = (frame_scores * frame_scores.new_tensor(within)).sum(dim=-1)  # [K, S]
    shares, divisor = chosen_weights(values.detach().double().cpu().numpy(), weights, config)
    return (values * values.new_tensor(shares / divisor)).sum(dim=-1)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean over the last axis, leaving NaN out."""
    present = ~np.isnan(values)
    mass = np.where(present, weights, 0.0).sum(axis=-1)
    total = np.where(present, values * weights, 0.0).sum(axis=-1)
    return np.where(mass > 0, total / np.where(mass > 0, mass, 1.0), np.nan)


def score_segments(
    score_frames: ScorerCall, media: Media, prompts: Sequence[PromptItem], config: SegmentsConfig, seed: int | None
) -> RewardScores:
    """Scores media [K, F, ...] with a frame scorer, each chosen frame once, in one batched call.

    `score_frames` gets Media with F = 1 and K * S * n entries, and returns checked (scores, parts).
    """
    takes, frames = media.frames.shape[:2]
    picks = pick_frames(frames, config.count, config.frames, seed)
    chosen = media.frames[:, picks.reshape(-1)]  # [K, S*n, H, W, 3]
    singles = Media(frames=chosen.reshape(takes * picks.size, 1, *chosen.shape[2:]), fps=media.fps)
    repeated = [prompt for prompt in prompts for _ in range(picks.size)]
    scores, parts = score_frames(singles, repeated)
    shape = (takes, *picks.shape)
    value, per_segment, weights = combine(scores.reshape(shape), picks, frames, config.attenuation, config.normalize)
    if config.aggregate != "mean":
        weights, divisor = chosen_weights(per_segment, weights, config)
        value = (weights * per_segment).sum(axis=1) / divisor
    return RewardScores(
        values=value.astype(np.float32),
        segment_values=per_segment.astype(np.float32),
        segment_weights=weights.astype(np.float32),
        segment_frames=picks,
        parts={
            key: combine(part.reshape(shape), picks, frames, config.attenuation, True)[0].astype(np.float32)
            for key, part in parts.items()
        },
    )
