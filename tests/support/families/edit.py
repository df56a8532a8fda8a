"""Families that start from a picture, a clip or a mask, or add a network to the denoiser."""

from __future__ import annotations

import inspect

import diffusers as d
import transformers as tf

from families import image as images
from families import parts as p
from families import video as videos
from families.image import BETAS, _euler_flow, _flux_transformer, stable_diffusion
from families.parts import DIM, tokenizer


def _through(cls, pipe, **more):
    """The components of one pipeline in another class, with some replaced."""
    names = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in {**pipe.components, **more}.items() if key in names})


def latent_consistency_img2img():
    return _through(d.LatentConsistencyModelImg2ImgPipeline, images.latent_consistency(), requires_safety_checker=False)


def chroma_img2img():
    return _through(d.ChromaImg2ImgPipeline, images.chroma())


def flux_fill():
    """The masked picture and the mask are further channels: 16 + 16 + 4 x 4."""
    return _through(d.FluxFillPipeline, images.flux(transformer=_flux_transformer(in_channels=48, out_channels=16)))


def flux_control():
    return _through(d.FluxControlPipeline, images.flux(transformer=_flux_transformer(in_channels=32, out_channels=16)))


def qwen_image_inpaint():
    return _through(d.QwenImageInpaintPipeline, images.qwen_image())


def sdxl_adapter():
    adapter = d.T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
    return _through(d.StableDiffusionXLAdapterPipeline, images.sdxl(), adapter=adapter)


def sdxl_controlnet():
    pipe = images.sdxl()
    net = d.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
    return _through(d.StableDiffusionXLControlNetPipeline, pipe, controlnet=net)


def upscale():
    return d.StableDiffusionUpscalePipeline(
        vae=p.kl(),
        text_encoder=p.clip(),
        tokenizer=tokenizer(),
        unet=p.unet(in_channels=7, num_class_embeds=100),
        low_res_scheduler=d.DDPMScheduler(),
        scheduler=d.DDIMScheduler(prediction_type="v_prediction"),
        max_noise_level=50,
    )


def panorama():
    """Copies the scheduler's state per view."""
    return stable_diffusion(d.StableDiffusionPanoramaPipeline, scheduler=d.DDIMScheduler(**BETAS, clip_sample=False))


def wan_video_to_video():
    return _through(d.WanVideoToVideoPipeline, videos.wan())


def animate_diff_controlnet():
    unet = p.unet()
    return d.AnimateDiffControlNetPipeline(
        unet=unet,
        controlnet=d.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8)),
        motion_adapter=d.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=2,
            motion_num_attention_heads=2,
        ),
        scheduler=d.DDIMScheduler(**BETAS, clip_sample=False),
        vae=p.kl(),
        text_encoder=p.clip(),
        tokenizer=tokenizer(),
    )


def pia():
    """AnimateDiff from a first frame, whose latents are further channels."""
    return d.PIAPipeline(
        unet=p.unet(),
        motion_adapter=d.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=2,
            motion_num_attention_heads=2,
            conv_in_channels=9,
        ),
        scheduler=d.DDIMScheduler(**BETAS, clip_sample=False),
        vae=p.kl(),
        text_encoder=p.clip(),
        tokenizer=tokenizer(),
    )


def framepack():
    encoder = tf.SiglipVisionModel(
        tf.SiglipVisionConfig(
            hidden_size=DIM,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    )
    return d.HunyuanVideoFramepackPipeline(
        **videos._hunyuan_parts(
            transformer=d.HunyuanVideoFramepackTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=10,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                patch_size=2,
                patch_size_t=1,
                guidance_embeds=True,
                text_embed_dim=DIM,
                pooled_projection_dim=DIM,
                rope_axes_dim=(2, 4, 4),
                image_condition_type=None,
                has_image_proj=True,
                image_proj_dim=DIM,
                has_clean_x_embedder=True,
            )
        ),
        image_encoder=encoder,
        feature_extractor=tf.SiglipImageProcessor(size={"height": 32, "width": 32}),
    )


def ltx_condition():
    return _through(d.LTXConditionPipeline, videos.ltx(), scheduler=_euler_flow(shift=1.0))


def _movq():
    return d.VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        latent_channels=4,
        norm_num_groups=32,
        norm_type="spatial",
        num_vq_embeddings=12,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        vq_embed_dim=4,
    )


def lumina_next():
    """Guidance acts on three of the four latent channels; the learned variance is dropped."""
    return d.LuminaPipeline(
        transformer=d.LuminaNextDiT2DModel(
            sample_size=8,
            hidden_size=24,
            num_layers=2,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=DIM,
        ),
        scheduler=_euler_flow(shift=1.0),
        vae=p.kl(levels=4),
        text_encoder=tf.GemmaModel(p._decoder_config(tf.GemmaConfig, DIM, 2)),
        tokenizer=tokenizer(32),
    )


def ovis_image():
    return d.OvisImagePipeline(
        scheduler=_euler_flow(use_dynamic_shifting=True),
        vae=p.kl(),
        text_encoder=p.qwen3(),
        tokenizer=p.chat_tokenizer(300),
        transformer=d.OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def sana_video():
    return d.SanaVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=p.gemma2(),
        vae=videos._wan_parts()["vae"],
        transformer=d.SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=DIM,
            mlp_ratio=2.0,
            sample_size=4,
            rope_max_seq_len=32,
        ),
        scheduler=d.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def amused():
    """Refused: masked tokens, not noise."""
    return d.AmusedPipeline(
        vqvae=_movq(),
        tokenizer=tokenizer(77),
        text_encoder=p.clip(True),
        transformer=d.UVit2DModel(
            hidden_size=8,
            cond_embed_dim=DIM,
            micro_cond_encode_dim=2,
            micro_cond_embed_dim=10,
            encoder_hidden_size=DIM,
            vocab_size=32,
            codebook_size=32,
            in_channels=8,
            block_out_channels=8,
            num_res_blocks=1,
            block_num_heads=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        ),
        scheduler=d.AmusedScheduler(mask_token_id=31),
    )


def skyreels_diffusion_forcing():
    """Refused: a copy of the scheduler per frame."""
    return _through(d.SkyReelsV2DiffusionForcingPipeline, videos.skyreels_v2())


def chrono_edit():
    parts = videos._wan_parts(image_encoder=p.clip_vision(), image_processor=p.clip_image_processor())
    parts["transformer"] = d.ChronoEditTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        out_channels=4,
        text_dim=DIM,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
        image_dim=DIM,
        added_kv_proj_dim=24,
    )
    return d.ChronoEditPipeline(**parts)


def lucy_edit():
    return _through(d.LucyEditPipeline, d.WanPipeline(**videos._wan_parts(transformer=videos._wan_transformer(8))))


def qwen_image_edit_plus():
    return images.qwen_image_edit(d.QwenImageEditPlusPipeline)
