"""Small random-weight diffusers pipelines made from the real classes, for tests that need structure, not pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from pipeline.config.schema import Config

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "b", "c", "red", "blue", "green", "circle", "square"]


def tokenizer(length: int = 8) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
    )


def _clip() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            projection_dim=16,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def sd3(folder: Path, seed: int = 0) -> Path:
    """A 16x16-pixel SD3 pipeline."""
    torch.manual_seed(seed)
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            shift_factor=0.0,
            scaling_factor=1.0,
        ),
        text_encoder=_clip(),
        tokenizer=tokenizer(),
        text_encoder_2=_clip(),
        tokenizer_2=tokenizer(),
        text_encoder_3=T5EncoderModel(
            T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        tokenizer_3=tokenizer(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def wan(folder: Path, seed: int = 0) -> Path:
    """A 5-frame 16x16-pixel Wan 2.1 pipeline."""
    torch.manual_seed(seed)
    WanPipeline(
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        tokenizer=tokenizer(),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def config(folder: Path, **sections) -> Config:
    """A small config on a tiny checkpoint; `sections` are merged into the top-level ones."""
    video = "wan" in folder.name
    base: dict = {
        "generator": {
            "pretrained": str(folder),
            "height": 32 if video else 16,  # enough latent values for the log-prob to average over
            "width": 32 if video else 16,
            "num_frames": 5 if video else 1,
            "call_kwargs": {"max_sequence_length": 8},
        },
        "prompts": {"train": "unused.txt"},
        "rewards": {"r": {"scorer": "unused"}},
        "sampler": {"steps": 4},
        "step": {"takes": 4, "groups": 2},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Config.model_validate(base)
