"""Qwen2-VL as the reader of a reward model: a picture or clip and a question go in, the last hidden state at the
question's reward tokens comes out. HPSv3 and VideoReward are a small head on it.

Both were trained with the positions 0, 1, 2, … for every token, pictures included, and not with Qwen2-VL's positions in
time, height and width (their forward pass leaves `position_ids` out); so the text model is called without them here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.core.devices import named_dtype, resolve_device
from pipeline.core.errors import InputError, RewardError
from pipeline.rewards.models.images import CLIP_MEAN, CLIP_STD
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
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture or clip as Qwen2-VL takes it."""

    patches: torch.Tensor  # float32 [t * h * w, 3 * 2 * 14 * 14], normalised
    grid: tuple[int, int, int]  # t, h, w in patches
    clip: bool


def fitted(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """The nearest multiples of 28 whose product is from `least` to `most` pixels, the aspect ratio kept as far as
    possible. If rounding leaves nothing between the two, `most` wins. Raises `RewardError` for extreme ratios."""
    if max(height, width) / min(height, width) > 200:
        raise RewardError(f"the picture is {width} x {height}; Qwen2-VL takes aspect ratios up to 200")
    new_h, new_w = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if new_h * new_w > most:
        shrink = math.sqrt(height * width / most)
        new_h, new_w = (max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width))
    elif new_h * new_w < least:
        grow = math.sqrt(least / (height * width))
        new_h, new_w = (math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width))
    return new_h, new_w


def shown(pixels: torch.Tensor, clip: bool) -> Shown:
    """Pixels [F, 3, H, W] from 0 to 255, H and W multiples of 28; F even for a clip, 1 for a picture (shown twice).

    A patch is 2 frames x 14 x 14 pixels in the order channel, time, row, column; patches come frame pair by frame pair,
    in blocks of 2 x 2 that the model merges into one token.
    """
    import torch

    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    x = (pixels.float() / 255 - mean) / std
    if not clip:
        x = x.expand(2, -1, -1, -1)
    t, h, w = x.shape[0] // 2, x.shape[2] // 14, x.shape[3] // 14
    x = x.reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return Shown(x.reshape(t * h * w, -1), (t, h, w), clip)


class QwenVlReader:
    """The backbone, the tokenizer with the reward tokens, and the head's weights (`head`, float32, names as saved)."""

    def __init__(
        self, weights: str, model: str, tokens: Sequence[str], device: str, dtype: str, batch: int, lora: float = 1.0
    ) -> None:
        """`weights`: safetensors of the whole model; `model`: Qwen2-VL's config and tokenizer. `lora`: alpha / rank of
        an adapter that is still apart in the weights."""
        from transformers import Qwen2VLConfig, Qwen2VLModel

        self.device, self.dtype, self.batch = resolve_device(device), named_dtype(dtype), check_batch(batch)
        path = weight_file(weights)
        backbone, head = split_weights(merged(read_safetensors(path), lora))
        embedding = backbone.get("language_model.embed_tokens.weight")
        if embedding is None or not head:
            raise InputError(f"{path}: expected a whole Qwen2-VL and a head named rm_head; see docs/rewards.md")
        self.head = {name: value.float().to(self.device) for name, value in head.items()}
        self.tokenizer = tokenizer(model)
        self.tokenizer.add_tokens(list(tokens), special_tokens=True)
        self.reward_ids = self.tokenizer.convert_tokens_to_ids(list(tokens))
        if max(self.reward_ids) >= len(embedding):
            raise InputError(
                f"{path}: has {len(embedding)} words, the tokenizer of {model} needs {max(self.reward_ids) + 1} for "
                f"{', '.join(tokens)}; give the `model` it was trained from"
            )
        self.special_tokens = [str(word) for word in self.tokenizer.added_tokens_decoder.values()]
        config = pretrained_config(Qwen2VLConfig, model)
        config.text_config.vocab_size = len(embedding)
        self.model = pretrained(Qwen2VLModel, model, self.device, self.dtype, config=config, state_dict=backbone)

    def read(self, items: Sequence[Shown], questions: Sequence[str]) -> torch.Tensor:
        """Last hidden states float32 [N, reward tokens, D] of N pictures or clips, each with its question."""
        import torch

        with torch.inference_mode():
            return torch.cat([self._read(items[part], questions[part]) for part in batches(len(items), self.batch)])

    def check_text(self, text: str) -> str:
        """The prompt, which may not contain the model's special tokens. Raises `RewardError`."""
        for word in self.special_tokens:
            if word in text:
                raise RewardError(f"the prompt {text!r:.60} holds {word}, which steers the reward model; take it out")
        return text

    def _read(self, items: Sequence[Shown], questions: Sequence[str]) -> torch.Tensor:
        import torch

        texts = [self._text(item, question) for item, question in zip(items, questions, strict=True)]
        rows = [torch.tensor(self.tokenizer(text).input_ids, device=self.device) for text in texts]
        # padding on the right, where no token looks: the model is causal
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        patches = torch.cat([item.patches for item in items]).to(self.device, self.dtype)
        grids = torch.tensor([item.grid for item in items], device=self.device)
        seen = torch.cat(self.model.get_image_features(patches, grids).pooler_output)
        words = self.model.get_input_embeddings()(ids)
        pads = [self.tokenizer.convert_tokens_to_ids(_pad(clip)) for clip in (False, True)]
        place = ((ids == pads[0]) | (ids == pads[1])) & mask.bool()
        words = words.masked_scatter(place[..., None].expand_as(words), seen.to(words.dtype))
        out = self.model.language_model(inputs_embeds=words, attention_mask=mask, use_cache=False).last_hidden_state
        at = torch.stack([(row == word).nonzero()[0, 0] for row in ids for word in self.reward_ids])
        at = at.view(len(rows), -1)
        return out[torch.arange(len(rows), device=self.device)[:, None], at].float()

    def _text(self, item: Shown, question: str) -> str:
        t, h, w = item.grid
        return f"{_BEFORE}{_pad(item.clip) * (t * h * w // 4)}<|vision_end|>{question}{_AFTER}"


def _pad(clip: bool) -> str:
    return "<|video_pad|>" if clip else "<|image_pad|>"


def merged(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """peft's names undone and its adapters added to what they adapt: W + scale x B A. Raises `InputError`."""
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
            raise InputError(f"the weights hold an adapter of {name}, but not all of it and what it adapts")
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
