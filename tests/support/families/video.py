"""Video families: tiny random-weight pipelines from the real classes."""

from __future__ import annotations

import diffusers as d

from families import parts as p
from families.image import BETAS, _euler_flow
from families.parts import DIM, tokenizer


def text_to_video_sd():
    """InstructVideo's base: the scheduler is handed frames folded into the batch."""
    return d.TextToVideoSDPipeline(
        unet=d.UNet3DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=DIM,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=d.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        vae=p.kl(),
        text_encoder=p.clip(),
        tokenizer=tokenizer(),
    )


def animate_diff():
    return d.AnimateDiffPipeline(
        unet=p.unet(),
        motion_adapter=d.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=2,
            motion_num_attention_heads=2,
        ),
        scheduler=d.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False),
        vae=p.kl(),
        text_encoder=p.clip(),
        tokenizer=tokenizer(),
    )


def _cogvideox_parts(channels: int = 4, **more):
    return {
        "transformer": d.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=channels,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=DIM,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=8,
            use_rotary_positional_embeddings=True,
            **more,
        ),
        "scheduler": d.CogVideoXDPMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, **BETAS
        ),
        "vae": d.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        "text_encoder": p.t5(),
        "tokenizer": tokenizer(),
    }


def cogvideox():
    return d.CogVideoXPipeline(**_cogvideox_parts())


def cogvideox_i2v():
    return d.CogVideoXImageToVideoPipeline(**_cogvideox_parts(8, use_learned_positional_embeddings=False))


def _wan_transformer(channels: int = 4, **more):
    return d.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=4,
        text_dim=DIM,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
        **more,
    )


def _wan_parts(**more):
    return {
        "transformer": _wan_transformer(),
        "scheduler": d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        "vae": d.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "text_encoder": p.umt5(),
        "tokenizer": tokenizer(),
        **more,
    }


def wan():
    return d.WanPipeline(**_wan_parts())


def wan_22():
    """Two experts: the first step is the high-noise one's."""
    return d.WanPipeline(**_wan_parts(transformer_2=_wan_transformer(), boundary_ratio=0.875))


def wan_i2v():
    return d.WanImageToVideoPipeline(
        **_wan_parts(
            transformer=_wan_transformer(12, image_dim=DIM, added_kv_proj_dim=24),
            image_encoder=p.clip_vision(),
            image_processor=p.clip_image_processor(),
        )
    )


def wan_22_ti2v():
    """Wan 2.2 5B's way: the image is the first latent frame, and timesteps are per token."""
    return d.WanImageToVideoPipeline(**_wan_parts(transformer_2=None, expand_timesteps=True))


def _hunyuan_transformer(channels: int = 4, **more):
    return d.HunyuanVideoTransformer3DModel(
        **{
            "in_channels": channels,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": DIM,
            "pooled_projection_dim": DIM,
            "rope_axes_dim": (2, 4, 4),
            **more,
        }
    )


def _hunyuan_parts(**more):
    return {
        "transformer": _hunyuan_transformer(),
        "scheduler": _euler_flow(shift=7.0),
        "vae": d.AutoencoderKLHunyuanVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=True,
            scaling_factor=1.0,
        ),
        "text_encoder": p.llama(),
        "tokenizer": tokenizer(),
        "text_encoder_2": p.clip(),
        "tokenizer_2": tokenizer(),
        **more,
    }


def hunyuan_video():
    return d.HunyuanVideoPipeline(**_hunyuan_parts())


def hunyuan_skyreels():
    return d.HunyuanSkyreelsImageToVideoPipeline(**_hunyuan_parts(transformer=_hunyuan_transformer(8)))


def hunyuan_video_i2v():
    """The image goes through Llava and into the first latent frame, which the scheduler does not see."""
    return d.HunyuanVideoImageToVideoPipeline(
        **_hunyuan_parts(
            transformer=_hunyuan_transformer(4, image_condition_type="token_replace", guidance_embeds=False),
            text_encoder=p.llava(),
            image_processor=p.clip_image_processor(),
        )
    )


def _ltx_parts():
    return {
        "transformer": d.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=DIM,
        ),
        "scheduler": _euler_flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
        "vae": d.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False, False, False, False, False),
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        "text_encoder": p.t5(),
        "tokenizer": tokenizer(),
    }


def ltx():
    return d.LTXPipeline(**_ltx_parts())


def ltx_i2v():
    """The first frame is kept from the scheduler and put back after each step."""
    return d.LTXImageToVideoPipeline(**_ltx_parts())


def mochi():
    return d.MochiPipeline(
        transformer=d.MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=DIM,
            time_embed_dim=4,
            max_sequence_length=8,
        ),
        scheduler=d.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=d.AutoencoderKLMochi(
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=p.t5(),
        tokenizer=tokenizer(),
    )


def latte():
    return d.LattePipeline(
        transformer=d.LatteTransformer3DModel(
            sample_size=8,
            video_length=2,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=DIM,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
        ),
        scheduler=d.DDIMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, clip_sample=False),
        vae=p.kl(),
        text_encoder=p.t5(),
        tokenizer=tokenizer(),
    )


def skyreels_v2():
    parts = _wan_parts()
    parts["transformer"] = d.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=DIM,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return d.SkyReelsV2Pipeline(**parts)


def wan_vace():
    parts = _wan_parts()
    parts["transformer"] = d.WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=DIM,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=72,
    )
    return d.WanVACEPipeline(**parts)


def stable_video_diffusion():
    """Refused: EDM noise levels, and a guidance scale per frame."""
    return d.StableVideoDiffusionPipeline(
        unet=d.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=8,
            in_channels=8,
            out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=DIM,
            num_attention_heads=8,
            projection_class_embeddings_input_dim=24,
            addition_time_embed_dim=8,
        ),
        scheduler=d.EulerDiscreteScheduler(
            **BETAS, prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True
        ),
        vae=d.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            latent_channels=4,
        ),
        image_encoder=p.clip_vision(True),
        feature_extractor=p.clip_image_processor(),
    )
