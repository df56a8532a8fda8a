"""CLIP embeddings for the scorers that use them: batched, each distinct prompt once, heads in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.core.devices import named_dtype, resolve_device
from pipeline.core.errors import RewardError
from pipeline.core.types import PromptItem
from pipeline.rewards.models.checkpointing import in_batches
from pipeline.rewards.models.clip_layout import from_open_clip, is_open_clip
from pipeline.rewards.models.images import Frames, Preprocess, preprocess
from pipeline.rewards.models.pretrained import (
    batches,
    check_batch,
    check_choice,
    pretrained,
    pretrained_config,
    read_safetensors,
    tokenizer,
    weight_file,
)

if TYPE_CHECKING:
    import torch


def _state(weights: str) -> dict[str, torch.Tensor]:
    tensors = read_safetensors(weight_file(weights))
    return from_open_clip(tensors) if is_open_clip(tensors) else tensors


class ClipEmbedder:
    """A CLIP checkpoint of transformers. Prompts beyond the context are cut, as in every official implementation
    (the end token is kept), and how many tokens that cost is reported; `long_prompts: error` refuses them instead."""

    def __init__(
        self,
        model: str,
        *,
        text: bool = True,
        weights: str | None = None,
        tokenizer_of: str | None = None,
        long_prompts: str = "cut",
        device: str = "auto",
        dtype: str = "float32",
        batch: int = 32,
        fit: Literal["crop", "letterbox"] = "crop",
        odd: Literal["floor", "round"] = "floor",
    ) -> None:
        """`text` False loads the image tower only. `weights`: a safetensors file to be used in place of `model`'s
        own, under transformers' or open_clip's names. `fit`, `odd`: see `Preprocess`."""
        self.long_prompts = check_choice("long_prompts", long_prompts, ("cut", "error"))
        self.batch, self.device, self.dtype = check_batch(batch), resolve_device(device), named_dtype(dtype)
        from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

        config = pretrained_config(CLIPConfig, model)
        if text:
            options = {} if weights is None else {"config": config, "state_dict": _state(weights)}
            self.model = pretrained(CLIPModel, model, self.device, self.dtype, **options)
            self.tokenizer = tokenizer(tokenizer_of or model)
            self.context = config.text_config.max_position_embeddings
        else:
            config.vision_config.projection_dim = config.projection_dim  # the vision config's may be a stale default
            tower = CLIPVisionModelWithProjection
            self.model = pretrained(tower, model, self.device, self.dtype, config=config.vision_config)
        self.width = config.projection_dim
        self.preprocess = Preprocess(size=config.vision_config.image_size, fit=fit, odd=odd)

    def images(self, frames: Frames) -> torch.Tensor:
        """N pictures -> unit vectors float32 [N, D], with gradients where the frames have them."""

        def embed(part: Frames) -> torch.Tensor:
            return self.embed_pixels(preprocess(part, self.preprocess))

        return in_batches(embed, frames, self.batch)

    def embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Preprocessed [N, 3, S, S] -> unit vectors float32 [N, D]."""
        import torch

        pixels = pixels.to(self.device, self.dtype)
        if hasattr(self.model, "get_image_features"):
            out = self.model.get_image_features(pixel_values=pixels)
            out = out if isinstance(out, torch.Tensor) else out.pooler_output
        else:
            out = self.model(pixel_values=pixels).image_embeds
        return torch.nn.functional.normalize(out.float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> tuple[torch.Tensor, np.ndarray]:
        """(unit vectors float32 [N, D], tokens cut off each prompt [N]). Each distinct text is embedded once."""
        import torch

        distinct = list(dict.fromkeys(texts))
        ids = [self.tokenizer(text, verbose=False).input_ids for text in distinct]
        cut = {t: max(0, len(i) - self.context) for t, i in zip(distinct, ids, strict=True)}
        if self.long_prompts == "error":
            for text, tokens in cut.items():
                if tokens:
                    raise RewardError(f"the prompt {text[:40]!r}… is {tokens} tokens longer than {self.context}")
        with torch.no_grad():  # not inference_mode, whose tensors autograd refuses
            rows = torch.cat([self._embed_texts(distinct[part]) for part in batches(len(distinct), self.batch)])
        index = {text: i for i, text in enumerate(distinct)}
        return rows[[index[t] for t in texts]], np.asarray([cut[t] for t in texts], dtype=np.float32)

    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        import torch

        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=self.context, return_tensors="pt")
        out = self.model.get_text_features(
            input_ids=inputs.input_ids.to(self.device), attention_mask=inputs.attention_mask.to(self.device)
        )
        out = out if isinstance(out, torch.Tensor) else out.pooler_output
        return torch.nn.functional.normalize(out.float(), dim=-1)

    def cosine(self, frames: Frames, prompts: Sequence[PromptItem]) -> tuple[torch.Tensor, np.ndarray]:
        """(cosine of picture and prompt [N], prompt tokens cut off [N]), with gradients where the frames have them."""
        texts, cut = self.texts([p.text for p in prompts])
        return (self.images(frames) * texts).sum(dim=-1), cut
