"""Exports what was trained in the formats that others load: a LoRA in several key styles or a whole folder."""

from __future__ import annotations

import glob
import inspect
import os
import shutil
from pathlib import Path

import psutil
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.core.types import WeightSet
from pipeline.generators import adapters
from pipeline.generators.checkpoint_files import ADAPTER_FILE, DENOISERS, LORA_FILE, check_lora, lora_files
from pipeline.generators.export_folder import load_lines
from pipeline.generators.key_styles import Layers, check_known, styled, styled_text_encoder
from pipeline.generators.load.pipeline import load_pipeline, model_index, trained_modules


def _load_trained(cfg: Config, weights: WeightSet) -> DiffusionPipeline:
    """The checkpoint's pipeline on the CPU with the trained weights in place, never quantised."""
    pipe = load_pipeline(cfg.generator.model_copy(update={"quantize": "none"}), torch.device("cpu"))
    modules = trained_modules(pipe, cfg.trainable)
    adapters.add_adapters(modules, cfg.trainable, cfg.run.seed)
    adapters.apply(modules, weights)
    return pipe


def _scratch_folder(out: Path) -> Path:
    """A scratch folder beside `out`, so that an incomplete export never has its name."""
    out = out.absolute()
    scratch = out.with_name(f".{out.name}.{os.getpid()}.partial")
    for left in (scratch, *out.parent.glob(f".{glob.escape(out.name)}.*.partial")):  # also of killed exports
        pid = left.name.split(".")[-2]
        if left == scratch or (pid.isdecimal() and not psutil.pid_exists(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    return scratch


def _finish(scratch: Path, out: Path) -> Path:
    if out.exists():
        shutil.rmtree(out)
    scratch.rename(out)
    return out


def export_lora(cfg: Config, weights: WeightSet, out: Path) -> Path:
    """Writes the adapter in the format that the pipeline's loader reads, and a README with the lines that load it.

    `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(out)`; components that the pipeline class has no
    LoRA loader for (a second expert, a class without one) get a folder each: for
    `pipe.<component>.load_lora_adapter(out/<component>, prefix=None)`, or in PEFT's format where the model class has
    no loader either. What the pipeline's loader reads is there in PEFT's format too (`adapter_config.json`): in `out`
    itself, or for several components in `out/peft/<component>`. alpha / rank is folded into lora_B, so that loaders
    that ignore alpha get the same model. Returns `out`. Raises ConfigError when full weights were trained.
    """
    if weights.kind != "lora":
        raise ConfigError("export: this run trained full weights; use --format full")
    pipe = _load_trained(cfg, weights)
    save = getattr(type(pipe), "save_lora_weights", None)
    parameters = inspect.signature(save).parameters if save is not None else {}
    pipeline_layers: dict[str, dict[str, torch.Tensor]] = {}
    others: list[str] = []
    scratch = _scratch_folder(out)
    for name, module in trained_modules(pipe, cfg.trainable).items():
        if not hasattr(module, "peft_config"):
            continue  # it contains none of trainable.targets
        state = _lora_state(cfg, module)
        has_loader = hasattr(module, "load_lora_adapter")
        if f"{name}_lora_layers" in parameters and (has_loader or name.startswith("text_encoder")):
            pipeline_layers[name] = state
            continue
        folder = scratch / name
        folder.mkdir(parents=True)
        if has_loader:
            save_file(state, folder / LORA_FILE)
            continue
        _save_for_peft(cfg, module, state, folder)
    if save is not None and pipeline_layers:
        layers = {f"{name}_lora_layers": state for name, state in pipeline_layers.items()}
        save(save_directory=scratch, safe_serialization=True, **layers)
        for name, state in pipeline_layers.items():
            folder = scratch if len(pipeline_layers) == 1 else scratch / "peft" / name
            _save_for_peft(cfg, getattr(pipe, name), state, folder)
            shown = folder.relative_to(scratch).as_posix()
            others.append(f'PeftModel.from_pretrained(pipe.{name}, "{shown}")')
    (scratch / "README.md").touch()  # in a folder with one, folders of components are looked for
    lines = load_lines(scratch)
    (scratch / "README.md").write_text(
        f"LoRA for {cfg.generator.pretrained} ({type(pipe).__name__}), made by Rushes.\n\n"
        + ("    from peft import PeftModel\n" if any("PeftModel" in line for line in [*lines, *others]) else "")
        + "    pipe = DiffusionPipeline.from_pretrained(...)\n"
        + "".join(f"    {line}\n" for line in lines)
        + ("\nThe same for PEFT, instead of the above:\n\n" if others else "")
        + "".join(f"    {line}\n" for line in others)
    )
    return _finish(scratch, out)


def export_styled(cfg: Config, weights: WeightSet, out: Path, style: str) -> Path:
    """Writes the LoRA in the key style of other programs (`key_styles`): `<style>.safetensors` with the denoiser and
    the text encoders, and `<style>_<component>.safetensors` for a further denoiser. Returns `out`.

    Raises ConfigError for full weights, and for a model without published names.
    """
    if weights.kind != "lora":
        raise ConfigError(f"--format {style}: this run trained full weights, there is no LoRA; use --format full")
    if cfg.trainable.modules == "controlnet":
        raise ConfigError(
            f"--format {style}: has no published names for a ControlNet's LoRA; use --format lora or full"
        )
    for name, entry in model_index(cfg.generator).items():
        if name in DENOISERS and isinstance(entry, list | tuple) and isinstance(entry[1], str):
            check_known(style, entry[1])  # before anything is loaded
    pipe = _load_trained(cfg, weights)
    files: dict[str, dict[str, torch.Tensor]] = {}
    denoisers = [name for name in DENOISERS if pipe.components.get(name) is not None]
    for name, module in trained_modules(pipe, cfg.trainable).items():
        layers = _lora_layers(cfg, module)
        if name in DENOISERS:
            stem = style if name == denoisers[0] else f"{style}_{name}"
            rows = {key: layer.out_features for key, layer in module.named_modules() if hasattr(layer, "out_features")}
            tensors = styled(style, type(module).__name__, dict(pipe.components[name].config), rows, layers)
        else:
            stem = style
            tensors = styled_text_encoder(_text_encoder_number(style, pipe, name), layers)
        files.setdefault(stem, {}).update(tensors)
    scratch = _scratch_folder(out)
    scratch.mkdir()
    rank = str(cfg.trainable.rank)
    about = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank, "format": "pt"}
    for stem, tensors in files.items():
        save_file(tensors, scratch / f"{stem}.safetensors", metadata=about if style == "kohya" else {"format": "pt"})
    return _finish(scratch, out)


def _text_encoder_number(style: str, pipe: DiffusionPipeline, name: str) -> int:
    """The number of lora_te<number>: CLIP encoders count from 1, T5 is 3, and 0 is the only encoder of a pipeline."""
    kind = type(pipe.components[name]).__name__
    if kind == "T5EncoderModel":
        return 3
    if not kind.startswith("CLIPTextModel"):
        raise ConfigError(f"--format {style}: has no published names for a text encoder {kind}; use --format lora")
    if not any(pipe.components.get(f"text_encoder_{number}") for number in (2, 3)):
        return 0
    return 2 if name == "text_encoder_2" else 1


def _lora_state(cfg: Config, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`<layer>.lora_A.weight` and `.lora_B.weight`, alpha / rank folded into lora_B."""
    scale = cfg.trainable.alpha / cfg.trainable.rank
    state = get_peft_model_state_dict(module, adapter_name=adapters.ADAPTER)
    return {k: (v * scale if "lora_B" in k else v).contiguous() for k, v in state.items()}


def _lora_layers(cfg: Config, module: torch.nn.Module) -> Layers:
    """Layer -> A [rank, in], B [out, rank]; {} for a module without any of trainable.targets."""
    if not hasattr(module, "peft_config"):
        return {}
    state = _lora_state(cfg, module)
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    return {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in names}


def _save_for_peft(cfg: Config, module: torch.nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained(module, folder)`. `state`:
    lora_A and lora_B by layer, with alpha / rank folded in."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = cfg.trainable.rank
    targets = [key for key, layer in module.named_modules() if isinstance(layer, LoraLayer)]
    base = cfg.generator.pretrained
    LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, base_model_name_or_path=base).save_pretrained(folder)
    save_file({f"base_model.model.{k}": v for k, v in state.items()}, folder / ADAPTER_FILE)


def load_lora(pipe: DiffusionPipeline, folder: Path) -> None:
    """Loads an export of `export_lora` into `pipe`, as its README says. Raises InputError for settings that are not a
    plain LoRA's, and what diffusers and PEFT raise."""
    files = lora_files(folder)
    check_lora(files)
    for path in files:
        name = path.parent.name
        if path.parent == folder:
            pipe.load_lora_weights(folder, weight_name=LORA_FILE, use_safetensors=True)
        elif path.name == LORA_FILE:
            getattr(pipe, name).load_lora_adapter(path.parent, prefix=None, use_safetensors=True)
        else:
            setattr(pipe, name, PeftModel.from_pretrained(getattr(pipe, name), path.parent).merge_and_unload())


def export_full(cfg: Config, weights: WeightSet, out: Path) -> Path:
    """Writes a whole diffusers folder for `DiffusionPipeline.from_pretrained(out)`; a LoRA is merged in."""
    pipe = _load_trained(cfg, weights)
    if weights.kind == "lora":
        adapters.merge_and_unload(trained_modules(pipe, cfg.trainable))
    scratch = _scratch_folder(out)
    pipe.save_pretrained(scratch, safe_serialization=True)
    return _finish(scratch, out)
