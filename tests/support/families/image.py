"""Image families: tiny random-weight pipelines from the real classes."""

from __future__ import annotations

from functools import partial

import diffusers as d
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as qwen_edit

from families import parts as p
from families.parts import DIM, tokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _euler_flow(**more):
    return d.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **more})


def stable_diffusion(cls=d.StableDiffusionPipeline, **more):
    return cls(
        **{
            "unet": p.unet(),
            "scheduler": d.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
            "vae": p.kl(),
            "text_encoder": p.clip(),
            "tokenizer": tokenizer(),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
            **more,
        }
    )


def stable_diffusion_v():
    """2.x: v-prediction with DDIM, whose default clamps x0."""
    scheduler = d.DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=True, clip_sample_range=3.0)
    return stable_diffusion(scheduler=scheduler)


def stable_diffusion_img2img():
    return stable_diffusion(d.StableDiffusionImg2ImgPipeline)


def inpaint():
    """The 4-channel UNet: what the mask keeps is blended back in after every step."""
    return stable_diffusion(d.StableDiffusionInpaintPipeline, scheduler=d.DDIMScheduler(**BETAS, clip_sample=False))


def inpaint_nine():
    return stable_diffusion(d.StableDiffusionInpaintPipeline, unet=p.unet(in_channels=9))


def controlnet():
    unet = p.unet()
    net = d.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    return stable_diffusion(d.StableDiffusionControlNetPipeline, unet=unet, controlnet=net)


def latent_consistency():
    return stable_diffusion(
        d.LatentConsistencyModelPipeline,
        unet=p.unet(time_cond_proj_dim=16),
        scheduler=d.LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True),
    )


def sdxl():
    return d.StableDiffusionXLPipeline(
        unet=p.unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=DIM + 24,
            cross_attention_dim=2 * DIM,
        ),
        scheduler=d.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        vae=p.kl(),
        text_encoder=p.clip(),
        tokenizer=tokenizer(),
        text_encoder_2=p.clip(True),
        tokenizer_2=tokenizer(),
    )


def kolors_like_pixart(cls=d.PixArtSigmaPipeline):
    return cls(
        transformer=d.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            patch_size=2,
            caption_channels=DIM,
            use_additional_conditions=False,
        ),
        scheduler=d.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        vae=p.kl(),
        text_encoder=p.t5(),
        tokenizer=tokenizer(),
    )


def pixart_alpha():
    return kolors_like_pixart(d.PixArtAlphaPipeline)


def sd3():
    return d.StableDiffusion3Pipeline(
        transformer=d.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * DIM,
            caption_projection_dim=16,
            pooled_projection_dim=2 * DIM,
            out_channels=4,
        ),
        scheduler=_euler_flow(),
        vae=p.kl(),
        text_encoder=p.clip(True),
        tokenizer=tokenizer(),
        text_encoder_2=p.clip(True),
        tokenizer_2=tokenizer(),
        text_encoder_3=p.t5(2 * DIM),
        tokenizer_3=tokenizer(),
    )


def _flux_transformer(**more):
    return d.FluxTransformer2DModel(
        **{
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": DIM,
            "pooled_projection_dim": DIM,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": True,
            **more,
        }
    )


def flux(cls=d.FluxPipeline, **more):
    return cls(
        **{
            "transformer": _flux_transformer(),
            "scheduler": _euler_flow(use_dynamic_shifting=True),
            "vae": p.kl(),
            "text_encoder": p.clip(),
            "tokenizer": tokenizer(),
            "text_encoder_2": p.t5(),
            "tokenizer_2": tokenizer(),
            **more,
        }
    )


def flux_kontext():
    return flux(d.FluxKontextPipeline)


def flux_controlnet():
    net = d.FluxControlNetModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=DIM,
        pooled_projection_dim=DIM,
        axes_dims_rope=[4, 4, 8],
    )
    return flux(d.FluxControlNetPipeline, controlnet=net)


def chroma():
    return d.ChromaPipeline(
        transformer=d.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            axes_dims_rope=(4, 4, 8),
            approximator_hidden_dim=32,
            approximator_layers=1,
            approximator_num_channels=16,
        ),
        scheduler=_euler_flow(),
        vae=p.kl(),
        text_encoder=p.t5(),
        tokenizer=tokenizer(),
    )


def flux2():
    """The Klein pipeline: FLUX.2's transformer and VAE with a Qwen3 text encoder."""
    return d.Flux2KleinPipeline(
        transformer=d.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * DIM,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        scheduler=_euler_flow(use_dynamic_shifting=True),
        vae=d.AutoencoderKLFlux2(
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=p.qwen3_causal(),
        tokenizer=p.chat_tokenizer(),
    )


def qwen_image():
    return d.QwenImagePipeline(**_qwen_parts(), tokenizer=p.tokenizer(1024))


def qwen_image_edit(cls=d.QwenImageEditPipeline):
    """Pictures to edit are always brought to 1 megapixel, here to a sixteenth of it; the VAE shrinks by 32."""
    if cls is d.QwenImageEditPipeline and not hasattr(qwen_edit.calculate_dimensions, "func"):
        qwen_edit.calculate_dimensions = partial(_smaller, qwen_edit.calculate_dimensions)
    parts = _qwen_parts(levels=6, width=2)
    return cls(**parts, tokenizer=p.tokenizer(1024), processor=p.qwen_processor())


def _smaller(dimensions, area: int, ratio: float):
    return dimensions(area / 16, ratio)


def _qwen_parts(levels: int = 2, width: int = 4):
    return {
        "transformer": d.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            axes_dims_rope=(4, 4, 8),
        ),
        "scheduler": _euler_flow(use_dynamic_shifting=True),
        "vae": d.AutoencoderKLQwenImage(
            base_dim=width,
            z_dim=4,
            dim_mult=[1] + [2] * (levels - 1),
            num_res_blocks=1,
            temperal_downsample=[False] * (levels - 1),
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "text_encoder": p.qwen25_vl(),
    }


def sana():
    return d.SanaPipeline(
        transformer=d.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=DIM,
            sample_size=8,
        ),
        scheduler=d.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=d.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=1.0,
        ),
        text_encoder=p.gemma2(),
        tokenizer=tokenizer(),
    )


def lumina2():
    return d.Lumina2Pipeline(
        transformer=d.Lumina2Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=16,
            ffn_dim_multiplier=None,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 128, 128),
            cap_feat_dim=DIM,
        ),
        scheduler=_euler_flow(shift=1.0),
        vae=p.kl(levels=4),
        text_encoder=p.gemma2(),
        tokenizer=tokenizer(64),
    )


def z_image():
    return d.ZImagePipeline(
        transformer=d.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=DIM,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        scheduler=_euler_flow(),
        vae=p.kl(),
        text_encoder=p.qwen3(),
        tokenizer=p.chat_tokenizer(),
    )
