"""PickScore: human preference for one of two pictures of a prompt, learnt on Pick-a-Pic (Kirstain et al., 2023)."""

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


@register("pickscore")
class PickScore(Scorer):
    """PickScore: exp(logit scale) times the cosine of picture and prompt (about 18 to 24)."""

    reads = "frame"
    needs_prompt = True
    tested_with = "random weights"
    gradient_note = ""

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str | None = None,
        scale: float = 1.0,
        long_prompts: str = "cut",
        device: str = "auto",
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        """`tokenizer`: folder or hub id if not the model's own. `scale` divides the score (flow_grpo: 26)."""
        self.scale = check_number("scale", scale, low=1e-6)
        self.clip = ClipEmbedder(
            model, tokenizer_of=tokenizer, long_prompts=long_prompts, device=device, dtype=dtype, batch=batch
        )
        self.logit_scale = float(self.clip.model.logit_scale.float().exp())

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        cosine, cut = self.clip.cosine(media.frames[:, 0], prompts)
        return {"score": cosine.cpu().numpy() * (self.logit_scale / self.scale), "cut_tokens": cut}

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        return self.clip.cosine(pixels[:, 0], prompts)[0] * (self.logit_scale / self.scale)
