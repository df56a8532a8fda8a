"""Subject similarity: does the picture show the subject of the reference picture? CLIP-I, DINO, and both with text.

The reference comes with the prompt: metadata `reference` of a prompts file (a path or a list of paths), else the
prompt's image. What a client of `rushes serve-reward` writes into metadata is no path here. With several references
the cosines are averaged, as in DreamBooth's evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.devices import named_dtype, resolve_device
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.checkpointing import in_batches
from pipeline.rewards.models.clip import ClipEmbedder
from pipeline.rewards.models.images import IMAGENET_MEAN, IMAGENET_STD, Frames, Preprocess, preprocess
from pipeline.rewards.models.pretrained import check_batch, check_number, pretrained
from pipeline.rewards.models.prompt_pictures import read_picture, references

if TYPE_CHECKING:
    import torch

_CACHED = 256  # reference embeddings kept


class ReferenceSimilarity:
    """Mean cosine of each picture with its prompt's references; embeddings of references are cached."""

    def __init__(self, embed: Callable[[Frames], torch.Tensor]) -> None:
        self.embed = embed
        self.cache: dict[str, torch.Tensor] = {}  # by path

    def __call__(self, frames: Frames, prompts: Sequence[PromptItem]) -> torch.Tensor:
        """Mean cosines [N], with gradients where the frames have them."""
        import torch

        images = self.embed(frames)
        rows = []
        for image, prompt in zip(images, prompts, strict=True):
            targets = torch.stack([self._reference(path) for path in references(prompt)])
            rows.append((targets @ image).mean())
        return torch.stack(rows)

    def _reference(self, path: str) -> torch.Tensor:
        if path not in self.cache:
            if len(self.cache) >= _CACHED:
                self.cache.pop(next(iter(self.cache)))
            self.cache[path] = self.embed(read_picture(path)[None])[0]
        return self.cache[path]


class DinoEmbedder:
    """[CLS] of a DINO or DINOv2 checkpoint: short side 256, central 224, ImageNet statistics."""

    def __init__(self, model: str, device: str, dtype: str, batch: int) -> None:
        from transformers import AutoModel

        self.batch, self.device, self.dtype = check_batch(batch), resolve_device(device), named_dtype(dtype)
        self.model = pretrained(AutoModel, model, self.device, self.dtype, unused="pooler.")
        trained = self.model.config.image_size  # DINOv2's is 518; like DINO it is used at 224
        size = min(224, trained)
        self.options = {"interpolate_pos_encoding": True} if size != trained else {}
        self.preprocess = Preprocess(
            size=size, resize=round(size * 256 / 224), odd="round", mean=IMAGENET_MEAN, std=IMAGENET_STD
        )

    def images(self, frames: Frames) -> torch.Tensor:
        """N pictures -> unit vectors float32 [N, D], with gradients where the frames have them."""
        import torch

        def embed(part: Frames) -> torch.Tensor:
            pixels = preprocess(part, self.preprocess).to(self.device, self.dtype)
            out = self.model(pixel_values=pixels, **self.options).last_hidden_state[:, 0]
            return torch.nn.functional.normalize(out.float(), dim=-1)

        return in_batches(embed, frames, self.batch)


@register("clip_i")
class ClipI(Scorer):
    """CLIP-I: cosine of the picture's and the reference picture's CLIP embeddings."""

    reads = "frame"
    tested_with = "random weights"
    gradient_note = ""

    def __init__(
        self,
        model: str = "openai/clip-vit-base-patch32",
        device: str = "auto",
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        clip = ClipEmbedder(model, text=False, device=device, dtype=dtype, batch=batch, odd="round")
        self.similarity = ReferenceSimilarity(clip.images)

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        return self.similarity(media.frames[:, 0], prompts).cpu().numpy()

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        return self.similarity(pixels[:, 0], prompts)


@register("dino")
class Dino(Scorer):
    """DINO: cosine of the picture's and the reference picture's DINO embeddings ([CLS])."""

    reads = "frame"
    tested_with = "random weights"
    gradient_note = ""

    def __init__(
        self, model: str = "facebook/dino-vits16", device: str = "auto", dtype: str = "float32", batch: int = 32
    ) -> None:
        self.similarity = ReferenceSimilarity(DinoEmbedder(model, device, dtype, batch).images)

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        return self.similarity(media.frames[:, 0], prompts).cpu().numpy()

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        return self.similarity(pixels[:, 0], prompts)


@register("subject")
class Subject(Scorer):
    """Lambda-harmonic mean of CLIP-I (same subject) and CLIP-T (as prompted): 1 / (l / I + (1 - l) / T) (RPO)."""

    reads = "frame"
    needs_prompt = True
    tested_with = "random weights"
    gradient_note = ""

    def __init__(
        self,
        model: str = "openai/clip-vit-base-patch32",
        balance: float = 0.3,
        floor: float = 1e-3,
        device: str = "auto",
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        """`balance`: lambda, the weight of the subject. Cosines below `floor` count as `floor`: the harmonic mean has
        poles at 0."""
        self.balance = check_number("balance", balance, 0.0, 1.0)
        self.floor = check_number("floor", floor, 1e-6, 1.0)
        self.clip = ClipEmbedder(model, device=device, dtype=dtype, batch=batch, odd="round")
        self.similarity = ReferenceSimilarity(self.clip.images)

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        subject, text, cut = self._cosines(media.frames[:, 0], prompts)
        score = self._harmonic(subject, text)
        numbers = {"score": score, "subject": subject, "text": text}
        return {**{key: value.cpu().numpy() for key, value in numbers.items()}, "cut_tokens": cut}

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        subject, text, _ = self._cosines(pixels[:, 0], prompts)
        return self._harmonic(subject, text)

    def _cosines(self, frames: Frames, prompts: Sequence[PromptItem]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        text, cut = self.clip.cosine(frames, prompts)
        return self.similarity(frames, prompts), text, cut

    def _harmonic(self, subject: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        a, b = subject.clamp(min=self.floor), text.clamp(min=self.floor)
        return 1.0 / (self.balance / a + (1.0 - self.balance) / b)
