"""The two shipped checkpoints: plain diffusers folders that sample, imperfect by about the right amount."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.shapes.card import held_out_prompts, mean_credits, sample
from jobs.shapes.parts import TEXT_LENGTH

MODELS = Path(__file__).parents[2] / "models"
KINDS = ("image", "video")
# Mean checker credit of 24 held-out prompts.  Wide: the point is that there is something to learn and
# something to learn from, whatever torch build draws the noise.
BAND = {"image": (0.35, 0.70), "video": (0.40, 0.75)}  # over few prompts: about 0.05 either way is chance


def folder(kind: str) -> Path:
    return MODELS / f"shapes-{kind}"


@lru_cache(maxsize=2)
def loaded(kind: str):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(folder(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_folder_is_small_and_holds_only_safetensors_weights(kind):
    files = [path for path in folder(kind).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png"}
    assert (folder(kind) / "README.md").exists() and (folder(kind) / "samples.png").exists()


@pytest.mark.parametrize(
    "kind, pipeline, transformer, vae",
    [
        ("image", "StableDiffusion3Pipeline", "SD3Transformer2DModel", "AutoencoderKL"),
        ("video", "WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan"),
    ],
)
def test_folder_names_stock_classes(kind, pipeline, transformer, vae):
    index = json.loads((folder(kind) / "model_index.json").read_text())
    assert index["_class_name"] == pipeline
    assert index["transformer"] == ["diffusers", transformer]
    assert index["vae"] == ["diffusers", vae]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_knows_every_held_out_prompt_and_ends_it_with_eos(kind):
    tokenizer = loaded(kind).tokenizer
    for prompt in held_out_prompts(kind, 200):
        ids = tokenizer(prompt, padding="max_length", max_length=TEXT_LENGTH).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) == TEXT_LENGTH
        assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.model_max_length == TEXT_LENGTH


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_prompts_score_in_the_band(kind):
    torch.manual_seed(0)
    prompts = held_out_prompts(kind, 24)
    takes = sample(loaded(kind), kind, prompts, seed=11)
    assert takes.shape == (24, 1 if kind == "image" else 9, 48, 48, 3)
    assert takes.dtype == np.uint8
    low, high = BAND[kind]
    assert low < mean_credits(takes, prompts)["reward"] < high


def test_latents_are_finite_and_about_unit_variance():
    for kind in KINDS:
        pipeline = loaded(kind)
        pipeline.set_progress_bar_config(disable=True)
        options = {"height": 48, "width": 48, "guidance_scale": 1.0, "max_sequence_length": TEXT_LENGTH}
        options |= {"num_frames": 9} if kind == "video" else {}
        prompts = held_out_prompts(kind, 8)
        out = pipeline(
            prompts,
            num_inference_steps=10,
            output_type="latent",
            generator=torch.Generator().manual_seed(1),
            **options,
        )
        latents = out.frames if kind == "video" else out.images
        assert tuple(latents.shape[1:]) == ((16, 3, 6, 6) if kind == "video" else (4, 12, 12))
        assert torch.isfinite(latents).all() and 0.6 < latents.std() < 1.5


def test_guidance_works_too():
    """A tenth of the training captions was empty, so the unconditional branch means something."""
    pipeline = loaded("image")
    takes = sample(pipeline, "image", held_out_prompts("image", 4), seed=3, guidance_scale=2.0)
    assert takes.shape == (4, 1, 48, 48, 3) and takes.std() > 5
