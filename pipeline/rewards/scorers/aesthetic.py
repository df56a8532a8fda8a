"""LAION aesthetic predictor v2: a linear head on CLIP ViT-L/14 (Schuhmann, 2022)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.errors import InputError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.clip import ClipEmbedder
from pipeline.rewards.models.images import Frames
from pipeline.rewards.models.pretrained import read_safetensors, weight_file

if TYPE_CHECKING:
    import torch


@register("aesthetic")
class Aesthetic(Scorer):
    """LAION aesthetic score from the normalised CLIP picture embedding; reads no prompt (about 4.5 to 7)."""

    reads = "frame"
    tested_with = "random weights"
    gradient_note = ""

    def __init__(
        self,
        head: str,
        model: str = "openai/clip-vit-large-patch14",
        device: str = "auto",
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        """`head`: safetensors of the linear layers (`layers.0.weight`, …; no activations between them)."""
        import torch

        self.clip = ClipEmbedder(model, text=False, device=device, dtype=dtype, batch=batch, odd="round")
        layers = linear_chain(read_safetensors(weight_file(head)), head, self.clip.width)
        self.layers = [(w.float().to(self.clip.device), b.float().to(self.clip.device)) for w, b in layers]
        self._linear = torch.nn.functional.linear

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        return self._rating(media.frames[:, 0]).cpu().numpy()

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        return self._rating(pixels[:, 0])

    def _rating(self, frames: Frames) -> torch.Tensor:
        x = self.clip.images(frames)
        for weight, bias in self.layers:
            x = self._linear(x, weight, bias)
        return x[:, 0]


def linear_chain(tensors: dict, source: str, width: int) -> list[tuple]:
    """[(weight, bias)] in the order of their layer numbers. Raises `InputError` unless they lead from `width` to 1."""
    by_number: dict[int, dict] = {}
    for name, tensor in tensors.items():
        match = re.search(r"(?:^|\.)(\d+)\.(weight|bias)$", name)
        if match and "vision_model" not in name:
            by_number.setdefault(int(match.group(1)), {})[match.group(2)] = tensor
    layers = [by_number[i] for i in sorted(by_number)]
    shapes = [list(layer["weight"].shape) if len(layer) == 2 else None for layer in layers]
    expected: int | None = width
    for shape in shapes:
        expected = shape[0] if shape is not None and len(shape) == 2 and shape[1] == expected else None
    if not layers or expected != 1:
        raise InputError(f"{source}: linear layers of shapes {shapes} do not lead from CLIP's {width} values to 1")
    return [(layer["weight"], layer["bias"]) for layer in layers]
