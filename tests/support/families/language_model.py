"""Image and video families whose prompts are encoded by a (vision-)language model, such as Qwen2.5-VL or Qwen3-VL."""

from __future__ import annotations

import diffusers as d
import transformers as tf

from families import image as images
from families import parts as p
from families import video as videos
from families.image import _euler_flow
from families.parts import DIM, tokenizer

ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
LANGUAGE = {
    "vocab_size": p.VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_scaling": ROPE,
    "rope_theta": 1e6,
}
MARKS = {
    "vision_start_token_id": len(p.WORDS) + 2,
    "image_token_id": len(p.WORDS) + 1,
    "video_token_id": len(p.WORDS) + 3,
}


def easy_animate():
    """Does not run without a negative prompt where it guides."""
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": DIM, "mlp_ratio": 2}
    spatial = ["SpatialDownBlock3D"] + ["SpatialTemporalDownBlock3D"] * 3
    return d.EasyAnimatePipeline(
        transformer=d.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=16,
            sample_height=16,
            num_layers=1,
            mmdit_layers=1,
            time_embed_dim=8,
            text_embed_dim=DIM,
        ),
        vae=d.AutoencoderKLMagvit(
            latent_channels=4,
            block_out_channels=[8] * 4,
            down_block_types=spatial,
            up_block_types=[name.replace("Down", "Up") for name in spatial],
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        ),
        scheduler=_euler_flow(),
        text_encoder=tf.Qwen2VLForConditionalGeneration(
            tf.Qwen2VLConfig(text_config=LANGUAGE, vision_config=vision, **MARKS)
        ),
        tokenizer=p.chat_tokenizer(64),
    )


def _kandinsky5(cls, vae):
    return cls(
        transformer=d.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=DIM,
            in_text_dim2=DIM,
            time_dim=32,
            out_visual_dim=4,
            model_dim=48,
            ff_dim=64,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(8, 8, 8),
        ),
        vae=vae,
        scheduler=_euler_flow(shift=5.0),
        text_encoder=p.qwen25_vl(),
        tokenizer=p.qwen_processor(),
        text_encoder_2=p.clip(),
        tokenizer_2=tokenizer(77),
    )


def kandinsky5_video():
    return _kandinsky5(d.Kandinsky5T2VPipeline, videos._hunyuan_parts()["vae"])


def kandinsky5_image():
    """Calls its pictures `image`, and always draws one of its own sizes."""
    return _kandinsky5(d.Kandinsky5T2IPipeline, p.kl())


def _byte_t5():
    config = tf.T5Config(vocab_size=400, d_model=DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {"text_encoder_2": tf.T5EncoderModel(config), "tokenizer_2": tf.ByT5Tokenizer()}


def hunyuan_video_15():
    """Guides by a component, the guider; the first 108 tokens are its prompt template's."""
    words = tokenizer(1000)
    words.chat_template = (
        "{% for i in range(120) %}b {% endfor %}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    return d.HunyuanVideo15Pipeline(
        transformer=d.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=DIM,
            text_embed_2_dim=DIM,
            image_embed_dim=DIM,
            rope_axes_dim=(2, 2, 4),
            target_size=64,
            task_type="t2v",
        ),
        vae=d.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8,) * 4,
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
            scaling_factor=1.0,
        ),
        scheduler=_euler_flow(shift=7.0),
        text_encoder=tf.Qwen2_5_VLTextModel(tf.Qwen2_5_VLConfig(text_config=LANGUAGE).text_config),
        tokenizer=words,
        guider=d.ClassifierFreeGuidance(guidance_scale=3.0),
        **_byte_t5(),
    )


def hunyuan_image():
    """Its guider switches to guidance with momentum at some step: earlier steps can be trained."""
    guider = d.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2)
    return d.HunyuanImagePipeline(
        transformer=d.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=DIM,
            text_embed_2_dim=DIM,
            rope_axes_dim=(4, 4),
        ),
        scheduler=_euler_flow(shift=7.0),
        vae=d.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32,) * 4,
            layers_per_block=1,
            scaling_factor=0.5,
            spatial_compression_ratio=8,
            sample_size=128,
        ),
        text_encoder=p.qwen25_vl(),
        tokenizer=tokenizer(1000),
        guider=guider,
        ocr_guider=None,
        **_byte_t5(),
    )


def qwen3_vl(layers: int = 4):
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": DIM,
        "deepstack_visual_indexes": [0],
        "patch_size": 14,
        "num_position_embeddings": 64,
    }
    text = {**LANGUAGE, "head_dim": 8, "num_hidden_layers": layers}
    return tf.Qwen3VLModel(tf.Qwen3VLConfig(text_config=text, vision_config=vision, **MARKS))


def krea2():
    return d.Krea2Pipeline(
        scheduler=_euler_flow(use_dynamic_shifting=True),
        vae=images._qwen_parts()["vae"],
        text_encoder=qwen3_vl(),
        tokenizer=p.chat_tokenizer(),
        transformer=d.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=DIM,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        text_encoder_select_layers=(1, 3),
    )


def longcat_image():
    """Each token's norm is capped by the conditional output's."""
    processor = p.qwen_processor()
    processor.chat_template = p.CHAT
    return d.LongCatImagePipeline(
        scheduler=_euler_flow(use_dynamic_shifting=True),
        vae=p.kl(latent=16),
        text_encoder=p.qwen25_vl(),
        tokenizer=p.chat_tokenizer(600),
        text_processor=processor,
        transformer=d.LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            pooled_projection_dim=DIM,
            axes_dims_rope=[4, 4, 8],
        ),
    )


def ernie_image():
    config = tf.Mistral3Config(
        text_config={**LANGUAGE, "rope_scaling": None, "model_type": "mistral", "head_dim": 8},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    )
    return d.ErnieImagePipeline(
        transformer=d.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=1,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=DIM,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=images.flux2().vae,
        text_encoder=tf.Mistral3Model(config),
        tokenizer=tokenizer(64),
        scheduler=_euler_flow(),
        pe=None,
        pe_tokenizer=None,
    )
