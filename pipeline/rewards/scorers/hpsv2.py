"""HPSv2 and HPSv2.1: human preference score on CLIP ViT-H/14 (Wu et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.errors import ConfigError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.clip import ClipEmbedder

if TYPE_CHECKING:
    import torch


@register("hpsv2")
class Hpsv2(Scorer):
    """HPSv2 / v2.1 (by the weights given): cosine of picture and prompt, no logit scale (about 0.15 to 0.35).

    The official val transform letterboxes: the long side becomes 224 and black bars fill the square, so nothing of a
    16:9 frame is cut off. Scores of v2.0 and v2.1 cannot be compared; nor can those of different prompts.
    """

    reads = "frame"
    needs_prompt = True
    tested_with = "random weights"
    gradient_note = ""

    def __init__(
        self,
        weights: str | None = None,
        model: str | None = None,
        tokenizer: str | None = None,
        long_prompts: str = "cut",
        device: str = "auto",
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        """`weights`: the published weights as safetensors (docs/rewards.md: how); `model` then gives config and
        tokenizer, by default LAION's ViT-H/14. Without `weights`, `model` holds HPS as a transformers CLIPModel."""
        if weights is None and model is None:
            raise ConfigError(
                "weights: not set; give HPSv2's weights as a .safetensors file (docs/rewards.md says how)"
            )
        self.clip = ClipEmbedder(
            model or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            weights=weights,
            tokenizer_of=tokenizer,
            long_prompts=long_prompts,
            device=device,
            dtype=dtype,
            batch=batch,
            fit="letterbox",
        )

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        cosine, cut = self.clip.cosine(media.frames[:, 0], prompts)
        return {"score": cosine.cpu().numpy(), "cut_tokens": cut}

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        return self.clip.cosine(pixels[:, 0], prompts)[0]
