"""Names of a LoRA's layers outside diffusers: the key styles of kohya's scripts and of ComfyUI.

Both name layers as the model's first publisher did, before diffusers renamed them, and where that model has one layer
for q, k and v, one LoRA holds all three: their A matrices one above the other, their B matrices on the diagonal of a
block matrix, which is the same product.

    kohya     lora_unet_<layer with _ for .>.lora_down.weight, .lora_up.weight, .alpha    (sd-scripts, musubi-tuner)
    comfyui   diffusion_model.<layer>.lora_A.weight, .lora_B.weight

ComfyUI, A1111, Forge and diffusers read U-Nets in kohya's style, so `comfyui` is the same for them. The published
names: sd-scripts' `networks/`, musubi-tuner's `networks/`, ComfyUI's `comfy/lora.py` and `comfy/utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.core.errors import ConfigError

Layers = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # name in diffusers -> A [rank, in], B [out, rank]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a layer of diffusers lies in the publisher's model: rows of `layer`'s weight."""

    layer: str
    part: int = 0  # which of the layers that were joined
    parts: tuple[str, ...] = ()  # their names in diffusers, in order; empty where the layer is one layer in both
    swap_halves: bool = False  # (scale, shift) in diffusers, (shift, scale) in the original


Rule = Callable[[str], Place | None]


def check_known(style: str, cls: str) -> None:
    """Raises ConfigError for a class of denoisers whose original names are not known."""
    if cls not in KNOWN:
        raise ConfigError(
            f"--format {style}: no published key style is known for {cls} (known: {', '.join(KNOWN)}); use --format "
            "lora, or --format full"
        )


def styled(
    style: str, cls: str, config: Mapping[str, Any], rows: Mapping[str, int], layers: Layers
) -> dict[str, torch.Tensor]:
    """The LoRA of one denoiser, of the class `cls`, in `style` (kohya or comfyui).

    `config`: the denoiser's own; `rows`: layer -> out features, of all its linear layers; `layers`: A and B by name,
    scaled such that the difference to a weight is B A. Raises ConfigError for a model or layer without a published
    name.
    """
    check_known(style, cls)
    rule, unet = _rule(cls, config), cls == "UNet2DConditionModel"
    joined: dict[str, list[tuple[Place, str]]] = {}
    for name in layers:
        place = rule(name)
        if place is None:
            raise ConfigError(
                f"--format {style}: the layer {name} of {cls} has no published name in that style; use --format lora"
            )
        joined.setdefault(place.layer, []).append((place, name))
    tensors: dict[str, torch.Tensor] = {}
    for layer, members in sorted(joined.items()):
        down, up = _join(members, rows, layers)
        tensors.update(_entry(style if not unet else "kohya", "lora_unet_", layer, down, up))
    return tensors


def styled_text_encoder(number: int, layers: Layers) -> dict[str, torch.Tensor]:
    """The LoRA of a text encoder, `lora_te<number>_…`, in the style that both read; 0: the only one (SD 1 and 2)."""
    prefix = f"lora_te{number or ''}_"
    tensors: dict[str, torch.Tensor] = {}
    for name, (down, up) in sorted(layers.items()):
        clip = re.match(r"(text_model\.)?encoder\.layers\.", name)
        tensors.update(_entry("kohya", prefix, f"text_model.{name}" if clip and not clip[1] else name, down, up))
    return tensors


def _entry(style: str, prefix: str, layer: str, down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
    down, up = down.contiguous(), up.contiguous()
    if style == "comfyui":
        return {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
    key = prefix + layer.replace(".", "_")
    alpha = torch.tensor(float(len(down)))  # alpha / rank = 1
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}


def _join(
    members: list[tuple[Place, str]], rows: Mapping[str, int], layers: Layers
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one layer of the original."""
    first, name = members[0]
    if not first.parts:
        down, up = layers[name]
        return down, torch.cat(up.chunk(2)[::-1]) if first.swap_halves else up
    members = sorted(members, key=lambda member: member[0].part)
    heights = [rows[part] for part in first.parts]
    down = torch.cat([layers[name][0] for _, name in members])
    up = down.new_zeros(sum(heights), len(down))
    column = 0
    for place, name in members:
        start, width = sum(heights[: place.part]), len(layers[name][0])
        up[start : start + heights[place.part], column : column + width] = layers[name][1]
        column += width
    return down, up


# ------------------------------------------------------------------------------------------ the original names


def _rule(cls: str, config: Mapping[str, Any]) -> Rule:
    if cls == "UNet2DConditionModel":
        if config.get("addition_embed_type") != "text_time":
            return lambda name: Place(layer=name)  # SD 1 and 2 are trained on diffusers' U-Net
        per_block = config.get("layers_per_block", 2)
        return lambda name: _sgm(name, per_block) if isinstance(per_block, int) else None
    if cls == "SD3Transformer2DModel":
        last = int(config["num_layers"]) - 1
        return lambda name: _mmdit(name, last)
    return _RULES[cls]


def _sgm(name: str, layers_per_block: int) -> Place | None:
    """SDXL's U-Net in its publisher's numbering, where a level's layers and its sampler count through."""
    middle = re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d+)\.(.+)", name)
    if middle:
        number = 1 if middle[1] == "attentions" else 2 * int(middle[2])
        return Place(layer=f"middle_block.{number}.{_resnet(middle[3])}")
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(attentions|resnets)\.(\d+)\.(.+)", name)
    if not block:
        return None
    side, level, kind, layer, rest = block.groups()
    number = int(level) * (layers_per_block + 1) + int(layer) + (side == "down")
    home = "input_blocks" if side == "down" else "output_blocks"
    return Place(layer=f"{home}.{number}.{int(kind == 'attentions')}.{_resnet(rest)}")


def _resnet(name: str) -> str:
    return "emb_layers.1" if name == "time_emb_proj" else name


def _fused(base: str, names: tuple[str, ...], name: str, layer: str) -> Place:
    return Place(layer=layer, part=names.index(name), parts=tuple(f"{base}.{n}" for n in names))


_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def _mmdit(name: str, last: int) -> Place | None:
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
    if not found:
        return None
    block, rest = int(found[1]), found[2]
    old, base = f"joint_blocks.{block}", f"transformer_blocks.{block}"
    for attention in ("attn", "attn2"):
        part = rest.removeprefix(f"{attention}.")
        if part != rest and part in _QKV:
            return _fused(f"{base}.{attention}", _QKV, part, f"{old}.x_block.{attention}.qkv")
        if part != rest and part in _ADDED_QKV:
            return _fused(f"{base}.{attention}", _ADDED_QKV, part, f"{old}.context_block.{attention}.qkv")
    renamed = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }.get(rest)
    if renamed is None:
        return None
    return Place(layer=f"{old}.{renamed}", swap_halves=block == last and rest == "norm1_context.linear")


def _flux(name: str) -> Place | None:
    single = re.fullmatch(r"single_transformer_blocks\.(\d+)\.(.+)", name)
    if single:
        base, old = f"single_transformer_blocks.{single[1]}", f"single_blocks.{single[1]}"
        parts = (*(f"attn.{part}" for part in _QKV), "proj_mlp")
        if single[2] in parts:
            return _fused(base, parts, single[2], f"{old}.linear1")
        renamed = {"proj_out": "linear2", "norm.linear": "modulation.lin"}.get(single[2])
        return Place(layer=f"{old}.{renamed}") if renamed else None
    found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
    if not found:
        return None
    base, old, rest = f"transformer_blocks.{found[1]}.attn", f"double_blocks.{found[1]}", found[2]
    part = rest.removeprefix("attn.")
    if part in _QKV:
        return _fused(base, _QKV, part, f"{old}.img_attn.qkv")
    if part in _ADDED_QKV:
        return _fused(base, _ADDED_QKV, part, f"{old}.txt_attn.qkv")
    renamed = {
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }.get(rest)
    return Place(layer=f"{old}.{renamed}") if renamed else None


def _wan(name: str) -> Place | None:
    found = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    if not found:
        return None
    attention = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    renamed = {
        **{f"attn1.{new}": f"self_attn.{old}" for new, old in attention.items()},
        **{f"attn2.{new}": f"cross_attn.{old}" for new, old in attention.items()},
        "attn2.add_k_proj": "cross_attn.k_img",
        "attn2.add_v_proj": "cross_attn.v_img",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
    }.get(found[2])
    return Place(layer=f"{found[1]}.{renamed}") if renamed else None


def _unchanged(name: str) -> Place | None:
    """Qwen-Image and LTX: diffusers kept the names of the blocks."""
    return Place(layer=name) if name.startswith("transformer_blocks.") else None


_RULES: dict[str, Rule] = {
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _wan,
    "SkyReelsV2Transformer3DModel": _wan,
    "QwenImageTransformer2DModel": _unchanged,
    "LTXVideoTransformer3DModel": _unchanged,
}
KNOWN = ("UNet2DConditionModel", "SD3Transformer2DModel", *_RULES)
