"""Qwen2-VL as the backbone of a reward model: maps a picture or clip and a question to the last hidden states at the
question's reward tokens. HPSv3 and VideoReward each put a small head on these.

Both models were trained with plain token positions 0, 1, 2, … (their forward pass leaves out `position_ids`), pictures
included, instead of Qwen2-VL's positions in time, height and width. So the text model is called without them here too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.core.devices import named_dtype, resolve_device
from pipeline.core.errors import InputError, RewardError
from pipeline.rewards.models.images import CLIP_MEAN, CLIP_STD, normalise
from pipeline.rewards.models.pretrained import (
    batches,
    check_batch,
    pretrained,
    pretrained_config,
    read_safetensors,
    tokenizer,
    weight_file,
)

if TYPE_CHECKING:
    import torch

FACTOR = 28  # sides are multiples of patch 14 x merge 2
_PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class VisionInput:
    """A picture or clip as Qwen2-VL's vision tower takes it."""

    patches: torch.Tensor  # float32 [t * h * w, 3 * 2 * 14 * 14], normalised
    grid: tuple[int, int, int]  # t, h, w in patches
    clip: bool


def resized_shape(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of 28 with `min_pixels` to `max_pixels` pixels, near the input's aspect ratio.
    If rounding leaves nothing between the two, `max_pixels` wins. Raises `RewardError` for extreme ratios."""
    if max(height, width) / min(height, width) > 200:
        raise RewardError(f"the picture is {width} x {height}; Qwen2-VL takes aspect ratios up to 200")
    new_h, new_w = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if new_h * new_w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_h, new_w = (max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width))
    elif new_h * new_w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_h, new_w = (math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width))
    return new_h, new_w


def vision_input(pixels: torch.Tensor, clip: bool) -> VisionInput:
    """Patches of pixels [F, 3, H, W] from 0 to 255, H and W multiples of 28; F even for a clip, 1 for a picture (which
    is repeated once).

    A patch is 2 frames x 14 x 14 pixels in the order channel, time, row, column; patches come frame pair by frame pair,
    in blocks of 2 x 2 that the model merges into one token.
    """
    x = normalise(pixels.float() / 255, CLIP_MEAN, CLIP_STD)
    if not clip:
        x = x.expand(2, -1, -1, -1)
    t, h, w = x.shape[0] // 2, x.shape[2] // 14, x.shape[3] // 14
    x = x.reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return VisionInput(x.reshape(t * h * w, -1), (t, h, w), clip)


class QwenVlReader:
    """The backbone, the tokenizer with the reward tokens, and the head's weights (`head`, float32, names as saved)."""

    def __init__(
        self, weights: str, model: str, tokens: Sequence[str], device: str, dtype: str, batch: int, lora: float = 1.0
    ) -> None:
        """`weights`: safetensors of the whole model; `model`: Qwen2-VL's config and tokenizer. `lora`: alpha / rank of
        the adapter, where the weights hold one unmerged."""
        from transformers import Qwen2VLConfig, Qwen2VLModel

        self.device, self.dtype, self.batch = resolve_device(device), named_dtype(dtype), check_batch(batch)
        path = weight_file(weights)
        backbone, head = split_weights(merge_adapters(read_safetensors(path), lora))
        embedding = backbone.get("language_model.embed_tokens.weight")
        if embedding is None or not head:
            raise InputError(f"{path}: expected all weights of Qwen2-VL and a head named rm_head; see docs/rewards.md")
        self.head = {name: value.float().to(self.device) for name, value in head.items()}
        self.tokenizer = tokenizer(model)
        self.tokenizer.add_tokens(list(tokens), special_tokens=True)
        self.reward_ids = self.tokenizer.convert_tokens_to_ids(list(tokens))
        if max(self.reward_ids) >= len(embedding):
            raise InputError(
                f"{path}: has {len(embedding)} token embeddings, the tokenizer of {model} needs "
                f"{max(self.reward_ids) + 1} for {', '.join(tokens)}; give the `model` it was trained from"
            )
        self.special_tokens = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        config = pretrained_config(Qwen2VLConfig, model)
        config.text_config.vocab_size = len(embedding)
        self.model = pretrained(Qwen2VLModel, model, self.device, self.dtype, config=config, state_dict=backbone)

    def read(self, items: Sequence[VisionInput], questions: Sequence[str]) -> torch.Tensor:
        """Last hidden states float32 [N, reward tokens, D] of N pictures or clips, each with its question.

        With gradients where the patches have them; more than one batch is then computed again in the backward pass.
        """
        import torch
        from torch.utils.checkpoint import checkpoint

        again = len(items) > self.batch and torch.is_grad_enabled() and items[0].patches.requires_grad
        rows = []
        for part in batches(len(items), self.batch):
            arguments = items[part], questions[part]
            rows.append(
                checkpoint(self._read, *arguments, use_reentrant=False, preserve_rng_state=False)
                if again
                else self._read(*arguments)
            )
        return torch.cat(rows)

    def check_text(self, text: str) -> str:
        """The prompt, which may not contain the model's special tokens. Raises `RewardError`."""
        for token in self.special_tokens:
            if token in text:
                raise RewardError(f"the prompt {text!r:.60} holds {token}, which steers the reward model; take it out")
        return text

    def _read(self, items: Sequence[VisionInput], questions: Sequence[str]) -> torch.Tensor:
        import torch

        texts = [self._text(item, question) for item, question in zip(items, questions, strict=True)]
        rows = [torch.tensor(self.tokenizer(text).input_ids, device=self.device) for text in texts]
        # padded on the right: the model is causal, so no token attends to the padding
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        patches = torch.cat([item.patches for item in items]).to(self.device, self.dtype)
        grids = torch.tensor([item.grid for item in items], device=self.device)
        features = torch.cat(self.model.get_image_features(patches, grids).pooler_output)
        embeddings = self.model.get_input_embeddings()(ids)
        pad_ids = [self.tokenizer.convert_tokens_to_ids(_pad(clip)) for clip in (False, True)]
        is_visual = ((ids == pad_ids[0]) | (ids == pad_ids[1])) & mask.bool()
        embeddings = embeddings.masked_scatter(
            is_visual[..., None].expand_as(embeddings), features.to(embeddings.dtype)
        )
        out = self.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, use_cache=False
        ).last_hidden_state
        positions = torch.stack([(row == token).nonzero()[0, 0] for row in ids for token in self.reward_ids])
        positions = positions.view(len(rows), -1)
        return out[torch.arange(len(rows), device=self.device)[:, None], positions].float()

    def _text(self, item: VisionInput, question: str) -> str:
        t, h, w = item.grid
        return f"{_PREFIX}{_pad(item.clip) * (t * h * w // 4)}<|vision_end|>{question}{_SUFFIX}"


def _pad(clip: bool) -> str:
    return "<|video_pad|>" if clip else "<|image_pad|>"


def merge_adapters(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The weights under their names without PEFT, adapters merged: W + scale x B A. Raises `InputError`."""
    out: dict[str, torch.Tensor] = {}
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        name = name.removeprefix("base_model.model.")
        part = re.match(r"(.+)\.lora_([AB])\.(?:default\.)?weight$", name)
        if part:
            adapters.setdefault(f"{part[1]}.weight", {})[part[2]] = value.float()
        else:
            out[name.replace(".base_layer.", ".")] = value
    for name, pair in adapters.items():
        if name not in out or set(pair) != {"A", "B"}:
            raise InputError(
                f"the weights hold an incomplete adapter of {name}: lora_A, lora_B and the base weight are all needed"
            )
        out[name] = (out[name].float() + scale * pair["B"] @ pair["A"]).to(out[name].dtype)
    return out


def split_weights(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(backbone under Qwen2VLModel's names, head), from the names of any transformers version."""
    backbone, head = {}, {}
    for name, value in tensors.items():
        if name.startswith("rm_head."):
            head[name] = value
        elif not name.startswith("lm_head."):
            name = re.sub(r"^model\.(?=visual\.|language_model\.)", "", name)
            backbone[re.sub(r"^model\.", "language_model.", name)] = value
    return backbone, head
