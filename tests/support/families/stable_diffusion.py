"""Stable Diffusion variants with other guidance or a picture as condition: tiny random-weight pipelines."""

from __future__ import annotations

import diffusers as d

from families import parts as p
from families.image import BETAS, sd3, sdxl, stable_diffusion
from families.parts import tokenizer


def instruct_pix2pix():
    """Three branches in one batch, two scales."""
    return stable_diffusion(d.StableDiffusionInstructPix2PixPipeline, unet=p.unet(in_channels=8))


def perturbed_attention():
    return d.StableDiffusionPAGPipeline(
        unet=p.unet(),
        scheduler=d.DDIMScheduler(**BETAS, clip_sample=False),
        vae=p.kl(),
        text_encoder=p.clip(),
        tokenizer=tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        pag_applied_layers=["mid"],
    )


def sdxl_img2img():
    return d.StableDiffusionXLImg2ImgPipeline(**sdxl().components)


def sd3_img2img():
    return d.StableDiffusion3Img2ImgPipeline(**_without(sd3().components, "image_encoder", "feature_extractor"))


def _without(components, *names):
    return {name: value for name, value in components.items() if name not in names}
