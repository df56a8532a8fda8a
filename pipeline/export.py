"""Exports what was trained in the formats that plain diffusers loads: a PEFT adapter or a whole pipeline folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.utils import get_peft_model_state_dict

from pipeline import weights as weights_lib
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.generators.loading import denoisers_of, load_pipeline
from pipeline.types import WeightSet


def _loaded(cfg: Config, weights: WeightSet) -> DiffusionPipeline:
    """The checkpoint's pipeline on the CPU with the trained weights in place."""
    pipe = load_pipeline(cfg.generator, torch.device("cpu"))
    modules = denoisers_of(pipe)
    weights_lib.attach(modules, cfg.trainable, cfg.run.seed)
    weights_lib.apply(modules, weights)
    return pipe


def _fresh(out: Path) -> Path:
    """A scratch folder beside `out`, so that a half-written export is never taken for a whole one."""
    scratch = out.with_name(out.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    return scratch


def _finish(scratch: Path, out: Path) -> Path:
    if out.exists():
        shutil.rmtree(out)
    scratch.rename(out)
    return out


def export_lora(cfg: Config, weights: WeightSet, out: Path) -> Path:
    """Writes `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(out)`. Returns `out`.

    alpha / rank is folded into lora_B, so that a loader that knows no alpha gets the same model.
    Raises ConfigError when full weights were trained.
    """
    if weights.kind != "lora":
        raise ConfigError("export: this run trained full weights; use --format full")
    pipe = _loaded(cfg, weights)
    scale = cfg.trainable.alpha / cfg.trainable.rank
    layers = {}
    for name, module in denoisers_of(pipe).items():
        state = get_peft_model_state_dict(module, adapter_name=weights_lib.ADAPTER)
        layers[f"{name}_lora_layers"] = {k: (v * scale if "lora_B" in k else v).contiguous() for k, v in state.items()}
    scratch = _fresh(out)
    type(pipe).save_lora_weights(save_directory=scratch, safe_serialization=True, **layers)
    return _finish(scratch, out)


def export_full(cfg: Config, weights: WeightSet, out: Path) -> Path:
    """Writes a whole diffusers folder for `DiffusionPipeline.from_pretrained(out)`; a LoRA is merged in."""
    pipe = _loaded(cfg, weights)
    if weights.kind == "lora":
        for module in denoisers_of(pipe).values():
            module.fuse_lora()
            module.unload_lora()  # takes the PEFT wrappers away; the merged weights stay
    scratch = _fresh(out)
    pipe.save_pretrained(scratch, safe_serialization=True)
    return _finish(scratch, out)
