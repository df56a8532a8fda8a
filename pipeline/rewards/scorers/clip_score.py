"""CLIP score: how well a picture matches its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.clip import ClipEmbedder
from pipeline.rewards.models.pretrained import check_number

if TYPE_CHECKING:
    import torch


@register("clip_score")
class ClipScore(Scorer):
    """Cosine of CLIP's picture and prompt embeddings, times `scale` (about 0.2 to 0.4)."""

    reads = "frame"
    needs_prompt = True
    tested_with = "random weights"
    gradient_note = ""

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        scale: float = 1.0,
        long_prompts: str = "cut",
        device: str = "auto",
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        """`scale`: 100 gives the published tables' numbers. Preprocessing: short side, centre crop, as transformers."""
        self.scale = check_number("scale", scale)
        self.clip = ClipEmbedder(model, long_prompts=long_prompts, device=device, dtype=dtype, batch=batch)

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        cosine, cut = self.clip.cosine(media.frames[:, 0], prompts)
        return {"score": cosine.cpu().numpy() * self.scale, "cut_tokens": cut}

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        return self.clip.cosine(pixels[:, 0], prompts)[0] * self.scale
