"""Takes as a frozen CLIP sees them; of clips the weighted mean of the frames that training scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.sections.rewards import SegmentsConfig
from pipeline.core.types import Media
from pipeline.rewards.models.clip import ClipEmbedder
from pipeline.rewards.segments import pick_frames, segment_weights

if TYPE_CHECKING:
    import torch


def embed_takes(clip: ClipEmbedder, media: Media, segments: SegmentsConfig) -> torch.Tensor:
    """media [K, F, H, W, 3] -> float32 [K, D] on the CPU: unit vectors, or of a clip their mean with the weights of its
    segments, so that a head which is linear in them gives the score that `segments` give (`aggregate: mean`)."""
    import torch

    takes, frames = media.frames.shape[:2]
    with torch.no_grad():
        if frames == 1:
            return clip.images(media.frames[:, 0]).cpu()
        picks = pick_frames(frames, segments.count, segments.frames, None)
        within, weights = segment_weights(picks, frames, segments.attenuation, segments.normalize)
        shares = within * weights[:, None] / (1 if segments.normalize else len(weights))  # [S, n]
        chosen = media.frames[:, picks.reshape(-1)]
        rows = clip.images(chosen.reshape(-1, *chosen.shape[2:])).cpu().view(takes, picks.size, -1)
        return (rows * torch.from_numpy(shares.reshape(-1).astype(np.float32))[:, None]).sum(dim=1)
