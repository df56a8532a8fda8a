"""Weights of open_clip's CLIP under the names of transformers' CLIPModel: HPSv2 is published in the former."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # sic
    "visual.ln_post": "vision_model.post_layernorm",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+)$")


def is_open_clip(tensors: dict[str, torch.Tensor]) -> bool:
    return "visual.conv1.weight" in tensors


def from_open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under transformers' names; what has no counterpart (buffers) keeps its name."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.match(name)
        layer, _, kind = name.rpartition(".")
        if name in _WHOLE:
            out[_WHOLE[name]] = tensor
        elif name in ("visual.proj", "text_projection"):  # open_clip multiplies from the right
            out["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = tensor.T
        elif layer in _NORMS:
            out[f"{_NORMS[layer]}.{kind}"] = tensor
        elif block:
            tower = "vision_model" if block.group(1) else "text_model"
            prefix, rest = f"{tower}.encoder.layers.{block.group(2)}", block.group(3)
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{prefix}.self_attn.{letter}_proj.{rest.rsplit('_', 1)[1]}"] = part
            else:
                inner, _, kind = rest.rpartition(".")
                out[f"{prefix}.{_IN_BLOCK.get(inner, inner)}.{kind}"] = tensor
        else:
            out[name] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}
