"""Small random components (text encoders, VAEs, UNets, transformers) that the checkpoints of `families` share."""

from __future__ import annotations

import torch
import transformers as tf
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import WORDS
from tiny import tokenizer as plain_tokenizer

from pipeline.generators.load.processors import VideoSettings, without_video

MARKS = ["<image>", "<|image_pad|>", "<|vision_start|>", "<|video_pad|>", "<|end_header_id|>"]
VOCAB = len(WORDS) + len(MARKS)
DIM = 16  # width of every text encoder


def tokenizer(length: int = 8):
    made = plain_tokenizer(length)
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return made


def clip(projection: bool = False, dim: int = DIM):
    config = tf.CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=dim,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=dim,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return (tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel)(config)


def t5(dim: int = DIM):
    return tf.T5EncoderModel(tf.T5Config(vocab_size=VOCAB, d_model=dim, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def umt5(dim: int = DIM):
    return tf.UMT5EncoderModel(tf.UMT5Config(vocab_size=VOCAB, d_model=dim, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _decoder_config(cls, dim: int, layers: int, **more):
    return cls(
        vocab_size=VOCAB,
        hidden_size=dim,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )


def llama(dim: int = DIM, layers: int = 3):
    return tf.LlamaModel(_decoder_config(tf.LlamaConfig, dim, layers))


def gemma2(dim: int = DIM):
    return tf.Gemma2Model(_decoder_config(tf.Gemma2Config, dim, 2))


def glm(dim: int = DIM):
    return tf.GlmModel(_decoder_config(tf.GlmConfig, dim, 2))


def qwen3(dim: int = DIM):
    return tf.Qwen3Model(_decoder_config(tf.Qwen3Config, dim, 3))


def qwen3_causal(dim: int = DIM):
    return tf.Qwen3ForCausalLM(_decoder_config(tf.Qwen3Config, dim, 28))


CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"


def chat_tokenizer(length: int = 64):
    made = tokenizer(length)
    made.chat_template = CHAT
    return made


def qwen25_vl(dim: int = DIM):
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": VOCAB,
                "hidden_size": dim,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
                "rope_theta": 1000000.0,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": dim,
            },
            vision_start_token_id=len(WORDS) + 2,
            image_token_id=len(WORDS) + 1,
            video_token_id=len(WORDS) + 3,
        )
    )


def qwen_processor(pixels: int = 56 * 56):
    """As transformers makes it, or without its video part where torchvision is missing. `pixels` per picture."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    kind = without_video("Qwen2VLProcessor")
    images = Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels)
    return kind(images, tokenizer(1024), VideoSettings(video_processor_type="Qwen2VLVideoProcessor"))


def llava(dim: int = DIM):
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=_decoder_config(tf.LlamaConfig, dim, 3),
            vision_config=clip_vision().config,
            image_token_index=len(WORDS),
            pad_token_id=0,
        )
    )


def clip_vision(projection: bool = False):
    config = tf.CLIPVisionConfig(
        hidden_size=DIM,
        projection_dim=DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=32,
        patch_size=8,
    )
    return (tf.CLIPVisionModelWithProjection if projection else tf.CLIPVisionModel)(config)


def clip_image_processor():
    return tf.CLIPImageProcessor(crop_size=32, size=32)


def kl(latent: int = 4, levels: int = 2, **more) -> AutoencoderKL:
    """An image VAE that shrinks by 2 ** (levels - 1)."""
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=latent,
        norm_num_groups=4,
        **{"shift_factor": 0.0, "scaling_factor": 1.0, **more},
    )


def unet(**more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": DIM,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            **more,
        }
    )


def liven(pipe, seed: int = 0) -> None:
    """Gives zero-initialised weights small random values, so that branches and conditions make a difference."""
    generator = torch.Generator().manual_seed(seed)
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            if name == "vae":  # biases would drown the latents in what so small a decoder paints
                for key, parameter in component.named_parameters():
                    if key.endswith("bias"):
                        parameter.data.zero_()
            for parameter in component.parameters():
                if parameter.ndim >= 2 and float(parameter.detach().std()) < 1e-6:
                    parameter.data.normal_(0.0, 0.05, generator=generator)


__all__ = [
    "DIM",
    "VOCAB",
    "clip",
    "clip_image_processor",
    "clip_vision",
    "gemma2",
    "glm",
    "kl",
    "liven",
    "llama",
    "qwen25_vl",
    "qwen3",
    "t5",
    "tokenizer",
    "umt5",
    "unet",
]
