"""A diffusers folder that is right as far as its files go, without any model: for checks that load nothing."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pipeline.config.schema import Config

COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def make_checkpoint(folder: Path) -> Path:
    """Sizes must be multiples of 16 (VAE 8 x patch 2) and frames 4 n + 1."""
    folder.mkdir(parents=True)
    index = {"_class_name": "WanPipeline", "_diffusers_version": "0.42.1", "image_encoder": [None, None], **COMPONENTS}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in COMPONENTS:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (folder / "vae" / "config.json").write_text('{"scale_factor_spatial": 8, "scale_factor_temporal": 4}')
    (folder / "transformer" / "config.json").write_text('{"patch_size": [1, 2, 2]}')
    for name in ("transformer", "vae", "text_encoder"):
        save_file({"weight": np.zeros((64, 64), np.float32)}, folder / name / "diffusion_pytorch_model.safetensors")
    return folder


def fake_config(root: Path, **sections) -> Config:
    """A config whose every check passes, with `sections` merged over it (one level deep)."""
    if not (root / "model").exists():
        make_checkpoint(root / "model")
        (root / "train.txt").write_text("a red circle\na blue cross\n")
        (root / "heldout.txt").write_text("a green square\n")
    base = {
        "run": {"dir": str(root / "runs")},
        "generator": {"pretrained": str(root / "model"), "height": 48, "width": 48, "num_frames": 9},
        "prompts": {"train": str(root / "train.txt"), "heldout": str(root / "heldout.txt")},
        "rewards": {"jpeg": {"scorer": "jpeg_compressibility"}},
        "ray": {"init": {"num_cpus": 4}, "address": "local"},
    }
    for name, values in sections.items():
        base[name] = values if name == "rewards" else {**base.get(name, {}), **values}
    return Config.model_validate(base)
