"""Random weights in the shapes of real models: speed and memory do not depend on their values.

The denoiser and the VAE have the published configs (stabilityai/stable-diffusion-3.5-medium,
black-forest-labs/FLUX.1-dev, Wan-AI/Wan2.1-T2V-1.3B-Diffusers), the text encoders one layer each, since a prompt is
encoded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from pipeline.config.schema import Config
from pipeline.core.types import PromptItem

PROMPT = PromptItem(index=0, text="a red cube on a wooden table")


@dataclass(frozen=True)
class Size:
    """Of a model and of what is asked of it."""

    height: int
    width: int
    num_frames: int
    takes: int  # of a group
    steps: int  # of the sampler
    batch: int  # takes in a call
    heads: int
    layers: int  # of the denoiser; Flux: double blocks, half as many as single ones
    channels: int  # of the image VAE's first block
    text: int = 4096  # width of the T5's embeddings
    small_video_vae: bool = False


# Pixels, frames, takes and steps are those of configs/sd3.5-medium.yaml and configs/wan-1.3b.yaml.
SIZES = {
    "sd3.5-medium": Size(512, 512, 1, takes=24, steps=10, batch=4, heads=24, layers=24, channels=128),
    "flux": Size(512, 512, 1, takes=12, steps=6, batch=4, heads=24, layers=19, channels=128),
    "wan-1.3b": Size(240, 416, 33, takes=8, steps=16, batch=4, heads=12, layers=30, channels=0),
}
# The same architectures on a CPU, in seconds: they try the code, and say nothing of a card.
TINY = {
    "sd3.5-medium": Size(64, 64, 1, takes=4, steps=4, batch=2, heads=2, layers=1, channels=32, text=2048),
    "flux": Size(64, 64, 1, takes=4, steps=4, batch=2, heads=2, layers=1, channels=32, text=256),
    "wan-1.3b": Size(
        32, 32, 5, takes=4, steps=4, batch=2, heads=2, layers=1, channels=0, text=256, small_video_vae=True
    ),
}


def _tokenizer(length: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
    )


def _clip(cls: Any, width: int) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=4,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=width // 64,
            projection_dim=width,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _t5(cls: Any, config: Any, width: int) -> Any:
    return cls(config(vocab_size=4, d_model=width, d_kv=64, d_ff=64, num_layers=1, num_heads=width // 64))


def _image_vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _sd35_medium(size: Size) -> Any:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=128,
            in_channels=16,
            num_layers=size.layers,
            attention_head_dim=64,
            num_attention_heads=size.heads,
            joint_attention_dim=size.text,
            caption_projection_dim=64 * size.heads,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(size.layers // 2 + 1)),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_image_vae(size.channels),
        text_encoder=_clip(CLIPTextModelWithProjection, 768),
        tokenizer=_tokenizer(77),
        text_encoder_2=_clip(CLIPTextModelWithProjection, 1280),
        tokenizer_2=_tokenizer(77),
        text_encoder_3=_t5(T5EncoderModel, T5Config, size.text),
        tokenizer_3=_tokenizer(256),
    )


def _flux(size: Size) -> Any:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=size.layers,
            num_single_layers=2 * size.layers,
            attention_head_dim=128,
            num_attention_heads=size.heads,
            joint_attention_dim=size.text,
            pooled_projection_dim=768,
            guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_image_vae(size.channels),
        text_encoder=_clip(CLIPTextModel, 768),
        tokenizer=_tokenizer(77),
        text_encoder_2=_t5(T5EncoderModel, T5Config, size.text),
        tokenizer_2=_tokenizer(512),
    )


def _wan(size: Size) -> Any:
    return WanPipeline(
        transformer=WanTransformer3DModel(
            num_attention_heads=size.heads,
            attention_head_dim=128,
            ffn_dim=8960,
            num_layers=size.layers,
            text_dim=size.text,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLWan(base_dim=8) if size.small_video_vae else AutoencoderKLWan(),
        text_encoder=_t5(UMT5EncoderModel, UMT5Config, size.text),
        tokenizer=_tokenizer(512),
    )


_BUILDERS: dict[str, Callable[[Size], Any]] = {"sd3.5-medium": _sd35_medium, "flux": _flux, "wan-1.3b": _wan}


def save_checkpoint(name: str, size: Size, folder: Path) -> None:
    """Writes the pipeline with random weights in bfloat16. Text encoders and tokenizers are made up."""
    torch.manual_seed(0)
    _BUILDERS[name](size).to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)


def config(folder: Path, size: Size, **sections: dict[str, Any]) -> Config:
    """GRPO with a LoRA of rank 32 and two trained steps. `sections`: keys of config sections to set besides."""
    prompts = folder / "prompts.txt"
    prompts.write_text(PROMPT.text + "\n")
    plain: dict[str, dict[str, Any]] = {
        "generator": {
            "pretrained": str(folder),
            "height": size.height,
            "width": size.width,
            "num_frames": size.num_frames,
            "dtype": "bfloat16",
            "call_kwargs": {"max_sequence_length": 256},
        },
        "trainable": {"kind": "lora", "rank": 32, "alpha": 64},
        "prompts": {"train": str(prompts)},
        "rewards": {"unused": {"scorer": "unused"}},
        "sampler": {"steps": size.steps, "window": {"kind": "random", "size": 2}},
        "objective": {"kl_beta": 0.0},
        "step": {"takes": size.takes},
        "learner": {"autocast": "bfloat16", "activation_checkpointing": True, "micro_batch": size.batch},
        "rollout": {"merge_lora": True, "batch": size.batch},
    }
    for name, keys in sections.items():
        plain[name] = {**plain.get(name, {}), **keys}
    return Config.model_validate(plain)
