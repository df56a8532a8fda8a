"""Families with a second denoiser for the unconditional branch, or with sound: random-weight pipelines."""

from __future__ import annotations

import diffusers as d
import transformers as tf
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from families import image as images
from families import parts as p
from families.image import _euler_flow
from families.language_model import LANGUAGE, qwen3_vl
from families.parts import DIM, tokenizer


def ideogram4():
    """A denoiser of its own for the unconditional branch; the picture's tokens come behind the text's."""
    denoisers = {
        name: d.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=13 * DIM,
            rope_theta=10000,
            mrope_section=(4, 2, 2),
        )
        for name in ("transformer", "unconditional_transformer")
    }
    return d.Ideogram4Pipeline(
        scheduler=_euler_flow(),
        vae=images.flux2().vae,
        text_encoder=qwen3_vl(36),
        tokenizer=p.chat_tokenizer(64),
        **denoisers,
    )


def ltx2():
    """Sound beside the picture, which a copy of the scheduler steps; guidance in x0 space, from four calls."""
    width, levels = 32, {"layers_per_block": (1,), "decoder_layers_per_block": (1, 1)}
    connector = {
        f"{kind}_connector_{key}": value
        for kind in ("video", "audio")
        for key, value in {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    language = {**LANGUAGE, "hidden_size": width, "num_hidden_layers": 2, "head_dim": 8, "rope_scaling": None}
    seeing = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return d.LTX2Pipeline(
        scheduler=_euler_flow(),
        vae=d.AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            **levels,
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
        ),
        audio_vae=d.AutoencoderKLLTX2Audio(
            base_channels=4,
            output_channels=2,
            ch_mult=(1,),
            num_res_blocks=1,
            attn_resolutions=None,
            in_channels=2,
            resolution=32,
            latent_channels=2,
            norm_type="pixel",
            causality_axis="height",
            mid_block_add_attention=False,
            mel_bins=8,
        ),
        text_encoder=tf.Gemma3ForConditionalGeneration(
            tf.Gemma3Config(
                text_config=language,
                vision_config={**seeing, "image_size": 32, "patch_size": 8},
                mm_tokens_per_image=4,
                image_token_index=len(p.WORDS),
            )
        ),
        tokenizer=tokenizer(64),
        connectors=LTX2TextConnectors(
            caption_channels=width,
            text_proj_in_factor=3,
            connector_rope_base_seq_len=32,
            rope_double_precision=False,
            rope_type="split",
            **connector,
        ),
        transformer=d.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=2,
            caption_channels=width,
            rope_double_precision=False,
            rope_type="split",
        ),
        vocoder=LTX2Vocoder(
            in_channels=16,
            hidden_channels=32,
            out_channels=2,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
        ),
    )
