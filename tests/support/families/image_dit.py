"""Image families with a diffusion transformer and T5, CLIP or LLaMA text encoders, or classes in place of text."""

from __future__ import annotations

import diffusers as d
import transformers as tf

from families import parts as p
from families.image import BETAS, _euler_flow
from families.parts import DIM, tokenizer


def aura_flow():
    return d.AuraFlowPipeline(
        transformer=d.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=DIM,
            out_channels=4,
            pos_embed_max_size=256,
        ),
        scheduler=_euler_flow(),
        vae=p.kl(),
        text_encoder=p.umt5(),
        tokenizer=tokenizer(),
    )


def cogview3():
    return d.CogView3PlusPipeline(
        transformer=d.CogView3PlusTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=DIM,
            time_embed_dim=8,
            condition_dim=2,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        scheduler=d.CogVideoXDDIMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        vae=p.kl(levels=4),
        text_encoder=p.t5(),
        tokenizer=tokenizer(),
    )


def cogview4():
    return d.CogView4Pipeline(
        transformer=d.CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=DIM,
            time_embed_dim=8,
            condition_dim=4,
        ),
        scheduler=_euler_flow(),
        vae=p.kl(levels=4),
        text_encoder=p.glm(),
        tokenizer=tokenizer(32),
    )


def hunyuan_dit():
    return d.HunyuanDiTPipeline(
        transformer=d.HunyuanDiT2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            in_channels=4,
            cross_attention_dim=DIM,
            cross_attention_dim_t5=DIM,
            pooled_projection_dim=16,
            hidden_size=24,
            activation_fn="gelu-approximate",
            text_len=77,
            text_len_t5=256,
        ),
        scheduler=d.DDPMScheduler(),
        vae=p.kl(),
        text_encoder=tf.BertModel(
            tf.BertConfig(
                vocab_size=p.VOCAB,
                hidden_size=DIM,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
            )
        ),
        tokenizer=tokenizer(77),
        text_encoder_2=p.t5(),
        tokenizer_2=tokenizer(256),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def hidream():
    llama = tf.LlamaForCausalLM(p.llama().config)
    return d.HiDreamImagePipeline(
        transformer=d.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[2 * DIM, DIM],
            text_emb_dim=2 * DIM,
            num_routed_experts=2,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=(0, 1),
            force_inference_output=True,
        ),
        scheduler=d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        vae=p.kl(),
        text_encoder=p.clip(True),
        tokenizer=tokenizer(),
        text_encoder_2=p.clip(True),
        tokenizer_2=tokenizer(),
        text_encoder_3=p.t5(2 * DIM),
        tokenizer_3=tokenizer(),
        text_encoder_4=llama,
        tokenizer_4=tokenizer(),
    )


def bria():
    return d.BriaPipeline(
        transformer=d.BriaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            axes_dims_rope=[0, 4, 4],
        ),
        scheduler=_euler_flow(),
        vae=p.kl(),
        text_encoder=p.t5(),
        tokenizer=tokenizer(),
    )


def class_conditional():
    return d.DiTPipeline(
        transformer=d.DiTTransformer2DModel(
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        vae=p.kl(),
        scheduler=d.DDIMScheduler(),
    )
