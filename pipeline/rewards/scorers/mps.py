"""MPS: human preference under a stated condition (Zhang et al., CVPR 2024, arXiv 2405.14705).

CLIP's picture tokens look at those tokens of the prompt that the condition has to do with, through a few layers of
cross- and self-attention; the score is the cosine of what comes out at [CLS] and the prompt, times CLIP's scale. The
condition names what is judged: light and colour, hands and faces, numbers and positions, or all of it (the default, for
the published `overall` weights). Several rewards with conditions of their own give several dimensions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.devices import named_dtype, resolve_device
from pipeline.core.errors import InputError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.checkpointing import in_batches
from pipeline.rewards.models.images import Frames, Preprocess, preprocess
from pipeline.rewards.models.pretrained import (
    check_batch,
    check_number,
    pretrained,
    pretrained_config,
    read_safetensors,
    tokenizer,
    weight_file,
)

if TYPE_CHECKING:
    import torch

OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
Layer = dict[str, "torch.Tensor"]
_CROSS = ("norm.weight", "to_q.weight", "to_kv.weight", "to_out.weight", "ff.0.weight", "ff.2.weight")
_SELF = ("norm.weight", "fused_attn_ff_proj.weight", "attn_out.weight", "ff_out.1.weight")


@register("mps")
class Mps(Scorer):
    """MPS: CLIP's scale times the cosine of the prompt and what the picture shows under `condition`."""

    reads = "frame"
    needs_prompt = True
    tested_with = "random weights"
    gradient_note = ""

    def __init__(
        self,
        weights: str,
        model: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        condition: str = OVERALL,
        threshold: float = 0.3,
        scale: float = 1.0,
        device: str = "auto",
        dtype: str = "float32",
        batch: int = 16,
    ) -> None:
        """`weights`: safetensors of the whole model; `model`: CLIP's config and tokenizer. `threshold`: prompt tokens
        whose similarity to the condition is below this share of the largest are masked (the published
        evaluation's 0.3; training used 0.01). `scale` divides the score."""
        self.device, self.dtype, self.batch = resolve_device(device), named_dtype(dtype), check_batch(batch)
        self.threshold, self.scale = check_number("threshold", threshold, 0.0, 1.0), check_number("scale", scale, 1e-6)
        from transformers import CLIPConfig, CLIPModel

        path = weight_file(weights)
        tensors = read_safetensors(path)
        config = pretrained_config(CLIPConfig, model)
        clip = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        if not clip:
            raise InputError(f"{path}: holds no weights named model.…; expected those of MPS (see docs/rewards.md)")
        self.clip = pretrained(CLIPModel, model, self.device, self.dtype, config=config, state_dict=clip)
        self.layers = [
            tuple({name: value.float().to(self.device) for name, value in part.items()} for part in layer)
            for layer in cross_layers(tensors, config.projection_dim, str(path))
        ]
        self.tokenizer = tokenizer(model)
        self.context = config.text_config.max_position_embeddings
        self.preprocess = Preprocess(size=config.vision_config.image_size)
        self.condition, _ = self._read(condition)
        self.logit_scale = float(self.clip.logit_scale.float().exp())

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        texts = [prompt.text for prompt in prompts]
        scores = self._preference(media.frames[:, 0], texts).cpu().numpy()
        lengths = {text: len(self.tokenizer(text, verbose=False).input_ids) for text in set(texts)}
        cut = np.asarray([max(0, lengths[text] - self.context) for text in texts], dtype=np.float32)
        return {"score": scores, "cut_tokens": cut}

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        return self._preference(pixels[:, 0], [prompt.text for prompt in prompts])

    def _preference(self, frames: Frames, texts: list[str]) -> torch.Tensor:
        """[N], with gradients where the frames have them."""
        import torch

        read = {text: self._prompt(text) for text in dict.fromkeys(texts)}
        rows = [torch.cat([read[text][i] for text in texts]) for i in range(3)]

        def compare(part: Frames, words: torch.Tensor, ends: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
            pixels = preprocess(part, self.preprocess).to(self.device, self.dtype)
            seen = self.clip.vision_model(pixel_values=pixels).last_hidden_state
            seen = self.clip.visual_projection(seen).float()  # all tokens, without CLIP's last layer norm
            for cross_weights, self_weights in self.layers:
                seen = seen + _cross_attention(seen, words, masks, cross_weights)
                seen = seen + _self_attention(seen, self_weights)
            return torch.nn.functional.cosine_similarity(seen[:, 0], ends, dim=-1)

        return in_batches(compare, frames, self.batch, *rows) * (self.logit_scale / self.scale)

    def _read(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens [1, T, D], end of text [1, D]) float32. The padding is read too, as MPS was trained."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        out = self.clip.text_model(input_ids=self.tokenizer(text, **options).input_ids.to(self.device))
        words, end = self.clip.text_projection(out.last_hidden_state), self.clip.text_projection(out.pooler_output)
        return words.float(), end.float()

    def _prompt(self, text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens [1, T, D], end [1, D], mask [1, 1, T] of 0 and -inf). The largest similarity is the prompt's own, as
        when MPS scores one prompt at a time."""
        import torch

        words, end = self._read(text)
        likeness = (words @ self.condition.transpose(1, 2)).amax(dim=2)  # [1, T]
        mask = torch.zeros_like(likeness).masked_fill(likeness / likeness.max() <= self.threshold, -math.inf)
        return words, end, mask[:, None]


def cross_layers(tensors: dict[str, torch.Tensor], width: int, path: str) -> list[tuple[Layer, Layer]]:
    """(cross-attention, self-attention) weights of each layer. Raises `InputError` for missing or other shapes."""
    import torch

    parts: dict[tuple[int, int], Layer] = {}
    for name, value in tensors.items():
        match = re.match(r"cross_model\.layers\.(\d+)\.([01])\.fn\.(.+)$", name)
        if match:
            plain = match[3].replace("norm.gamma", "norm.weight").replace("norm.beta", "norm.bias")
            parts.setdefault((int(match[1]), int(match[2])), {})[plain] = value
    count = len(parts) // 2
    for number in range(count):
        for part, names in enumerate((_CROSS, _SELF)):
            layer = parts.get((number, part), {})
            missing = [name for name in names if name not in layer]
            if missing:
                raise InputError(f"{path}: cross_model.layers.{number}.{part}.fn.{missing[0]} is missing; not MPS?")
            layer.setdefault("norm.bias", torch.zeros(len(layer["norm.weight"])))
            if len(layer["norm.weight"]) != width:
                raise InputError(f"{path}: the cross model is {len(layer['norm.weight'])} wide, CLIP's tokens {width}")
    if not count or len(parts) % 2:
        raise InputError(f"{path}: holds no whole cross_model; expected MPS's cross_model.layers.…")
    return [(parts[number, 0], parts[number, 1]) for number in range(count)]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Heads of q [B, N, heads * d] share one k and v [B, M, d] (multi-query). Returns [B, N, heads * d]."""
    import torch

    b, n, _ = q.shape
    d = k.shape[-1]
    scores = torch.einsum("bnhd,bmd->bhnm", q.reshape(b, n, -1, d), k) / math.sqrt(d)
    if mask is not None:
        scores = scores + mask[:, None]
    return torch.einsum("bhnm,bmd->bnhd", scores.softmax(dim=-1), v).reshape(b, n, -1)


def _gated(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU: the second half gates the first."""
    import torch

    value, gate = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


def _normed(x: torch.Tensor, w: Layer) -> torch.Tensor:
    import torch

    return torch.nn.functional.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"])


def _cross_attention(x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor, w: Layer) -> torch.Tensor:
    """Cross-attention of picture tokens x [B, N, D] to prompt tokens [B, T, D], in parallel with a feed-forward."""
    h = _normed(x, w)
    k, v = (words @ w["to_kv.weight"].T).chunk(2, dim=-1)
    seen = _attend(h @ w["to_q.weight"].T, k, v, mask) @ w["to_out.weight"].T
    return seen + _gated(h @ w["ff.0.weight"].T) @ w["ff.2.weight"].T


def _self_attention(x: torch.Tensor, w: Layer) -> torch.Tensor:
    """Self-attention with rotary positions, and a feed-forward, from one fused projection."""
    h = _normed(x, w) @ w["fused_attn_ff_proj.weight"].T
    inner, hidden = w["attn_out.weight"].shape[1], 2 * w["ff_out.1.weight"].shape[1]
    d = (h.shape[-1] - inner - hidden) // 2
    q, k, v, ff = h.split((inner, d, d, hidden), dim=-1)
    b, n, _ = q.shape
    turned = _rotated(q.reshape(b, n, -1, d)).reshape(b, n, -1)
    return _attend(turned, _rotated(k[:, :, None])[:, :, 0], v, None) @ w["attn_out.weight"].T + (
        _gated(ff) @ w["ff_out.1.weight"].T
    )


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al.) of x [B, N, heads, d]: pairs (i, i + d/2) turn by position / 10000^(2i/d)."""
    import torch

    n, d = x.shape[1], x.shape[3]
    speed = 10000 ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
    angle = (torch.arange(n, device=x.device, dtype=torch.float32)[:, None] * speed)[None, :, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
