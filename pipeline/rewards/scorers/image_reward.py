"""ImageReward v1.0: a preference head on BLIP's picture-grounded text encoder (Xu et al., 2023).

The model is put together from transformers' BLIP parts; the official checkpoint's names are translated, so that the
published weights, once saved as safetensors, load as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.devices import resolve_device
from pipeline.core.errors import InputError
from pipeline.core.reading import read_json_object
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.checkpointing import in_batches
from pipeline.rewards.models.images import Frames, Preprocess, preprocess
from pipeline.rewards.models.pretrained import check_batch, read_safetensors, tokenizer, weight_file

if TYPE_CHECKING:
    import torch

TOKENS = 35  # prompts are padded to, and silently cut off at, this many tokens
MEAN, STD = 0.16717362830052426, 1.0333394966054072

# The published model: BLIP-large's picture tower, BERT-base with cross-attention. A config.json beside them wins.
PUBLISHED = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
    },
}

_OFFICIAL = [
    (r"^blip\.text_encoder\.", "text_encoder."),
    (r"^blip\.visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
]


def transformers_name(name: str) -> str:
    """The name a weight of the official ImageReward checkpoint has in transformers' BLIP (others: unchanged)."""
    for pattern, replacement in _OFFICIAL:
        name, hits = re.subn(pattern, replacement, name)
        if hits:
            return name
    return name


@register("image_reward")
class ImageReward(Scorer):
    """ImageReward v1.0: (x - 0.16718) / 1.03334 of the official head (about -2.3 to +2)."""

    reads = "frame"
    needs_prompt = True
    tested_with = "random weights"
    gradient_note = ""

    def __init__(self, model: str, tokenizer_of: str | None = None, device: str = "auto", batch: int = 16) -> None:
        """`model`: folder with the weights as one safetensors file and BERT's tokenizer (or `tokenizer_of`)."""
        self.device, self.batch = resolve_device(device), check_batch(batch)
        self.model = build(Path(model)).to(self.device)
        self.tokenizer = tokenizer(tokenizer_of or model)
        self.preprocess = Preprocess(size=self.model["vision_model"].config.image_size, odd="round")

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        texts = [p.text for p in prompts]
        scores = self._preference(media.frames[:, 0], texts)
        lengths = {text: len(self.tokenizer(text, verbose=False).input_ids) for text in set(texts)}
        cut = np.asarray([max(0, lengths[t] - TOKENS) for t in texts], dtype=np.float32)
        return {"score": scores.cpu().numpy(), "cut_tokens": cut}

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        return self._preference(pixels[:, 0], [p.text for p in prompts])

    def _preference(self, frames: Frames, texts: list[str]) -> torch.Tensor:
        """[N], with gradients where the frames have them."""
        options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        inputs = self.tokenizer(texts, **options).to(self.device)

        def read(part: Frames, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            pixels = preprocess(part, self.preprocess).to(self.device)
            seen = self.model["vision_model"](pixel_values=pixels).last_hidden_state
            state = self.model["text_encoder"](
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=mask.dtype),
            ).last_hidden_state[:, 0]
            return (self.model["mlp"]["layers"](state.float())[:, 0] - MEAN) / STD

        return in_batches(read, frames, self.batch, inputs.input_ids, inputs.attention_mask)


def build(folder: Path) -> Any:
    """The model in eval mode with every weight loaded. Raises `InputError` if one is missing or of another shape."""
    import torch
    from torch import nn
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    path = weight_file(str(folder))
    config_file = path.parent / "config.json"
    try:
        config = read_json_object(config_file, "copy it again", lenient=True) if config_file.is_file() else PUBLISHED
        vision = BlipVisionConfig(**config["vision_config"])
        # is_decoder gives the layers their cross-attention; the encoder is still called without a causal mask
        text = {**config["text_config"], "encoder_hidden_size": vision.hidden_size, "is_decoder": True}
        text_config = BlipTextConfig(**text)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{config_file}: not a BLIP config ({error})") from error
    sizes = [text_config.hidden_size, 1024, 128, 64, 16, 1]
    linears = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    places = [linears[0], nn.Identity(), linears[1], nn.Identity(), linears[2], nn.Identity(), linears[3], linears[4]]
    model = nn.ModuleDict(  # the identities stand for the official head's dropouts, so that the numbering agrees
        {
            "vision_model": BlipVisionModel(vision),
            "text_encoder": BlipTextModel(text_config, add_pooling_layer=False),
            "mlp": nn.ModuleDict({"layers": nn.Sequential(*places)}),
        }
    )
    loaded = {transformers_name(k): v.float() for k, v in read_safetensors(path).items()}
    expected = model.state_dict()
    bad = [k for k, v in expected.items() if k not in loaded and not k.endswith("position_ids")]
    bad += [k for k, v in expected.items() if k in loaded and loaded[k].shape != v.shape]
    if bad:
        names = ", ".join(bad[:3])
        raise InputError(f"{path}: {len(bad)} weights of ImageReward are missing or of another shape ({names})")
    with torch.no_grad():
        model.load_state_dict({k: loaded[k] for k in expected if k in loaded}, strict=False)
    return model.eval().requires_grad_(False)
