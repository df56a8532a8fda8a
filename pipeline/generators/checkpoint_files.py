"""Checks a local diffusers folder by its files alone: nothing is loaded, no torch is imported.

A truncated or corrupt safetensors file is recognised by its header: 8 bytes of length, JSON, and data that must fill
the rest of the file exactly. Pickle weights are refused, because loading them runs code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.code_names import check_kernels, check_lora_settings, check_model_index, check_own_code
from pipeline.core.errors import InputError
from pipeline.core.files import describe_os_error
from pipeline.core.reading import parse_json, parse_json_object, read_json_object
from pipeline.core.safe_paths import check_regular

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")  # their component names in diffusers
CONTROLNET = "controlnet"  # prefix of the component names of what feeds them
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of a LoRA's weights
STYLES = ("kohya", "comfyui")  # key styles of a LoRA that other programs read
ADAPTER_FILE = "adapter_model.safetensors"  # PEFT's, for a component that diffusers has no LoRA loader for

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # of diffusers and of transformers
_MAX_HEADER = 100_000_000


def is_local(pretrained: str) -> bool:
    """Whether `pretrained` means a folder rather than a hub id (owner/name)."""
    path = Path(pretrained)
    return path.exists() or path.is_absolute() or pretrained.startswith((".", "~")) or len(path.parts) != 2


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `InputError`."""
    if not path.exists():
        raise InputError(f"{path}: is missing; copy the checkpoint again")
    return read_json_object(path, "copy the checkpoint again", lenient=True, limit=_MAX_HEADER)


def check_safetensors(path: Path) -> dict[str, Any]:
    """Returns the header (name -> dtype, shape, data_offsets). Raises `InputError` if it or the length is wrong."""
    again = "the file is corrupt or cut off, copy it again"
    check_regular(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(_MAX_HEADER, size - 8):
                hint = " (a git-lfs pointer: run git lfs pull)" if head == b"version " else ""
                raise InputError(f"{path}: is not a complete safetensors file{hint}; {again}")
            header = parse_json_object(file.read(length), f"{path}: its safetensors header", again)
    except OSError as error:
        raise InputError(f"cannot read {describe_os_error(error, path)}") from None
    try:
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (TypeError, KeyError, IndexError, AttributeError):
        raise InputError(f"{path}: its safetensors header is malformed; {again}") from None
    if 8 + length + end != size:
        raise InputError(f"{path}: has {size:,} bytes but its header states {8 + length + end:,}; {again}")
    return header


def check_diffusers_folder(folder: Path, own_class: bool = True) -> dict[str, str]:
    """Returns component -> class name of a complete diffusers folder. Raises `InputError` naming what is wrong.

    `own_class`: it is loaded as the pipeline class that it names.
    """
    if not folder.is_dir():
        _refuse_single_file(folder)
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise InputError(
            f"{folder}: {what}; generator.pretrained must be a diffusers folder (with "
            "model_index.json) or a hub id owner/name"
        )
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder}: has no model_index.json, so it is not a diffusers checkpoint; save one with "
            "pipeline.save_pretrained(folder)"
        )
    index = read_json(folder / "model_index.json")
    entries = check_model_index(index, folder / "model_index.json", own_class)
    check_own_code(folder, entries)
    components = {}
    for name, (_, cls) in entries.items():
        components[name] = cls
        _check_component(folder / name, cls)
    if not components:
        raise InputError(f"{folder / 'model_index.json'}: lists no components; copy the checkpoint again")
    return components


def _refuse_single_file(path: Path) -> None:
    """Says what to do with a checkpoint in one file. Raises `InputError` for the known kinds."""
    if path.suffix == ".gguf":
        raise InputError(
            f"{path}: GGUF weights are quantised, and neither trained nor a base whose LoRA others could use; give the "
            "original checkpoint as a diffusers folder or hub id (generator.quantize: int8 saves memory under a LoRA)"
        )
    if path.suffix in _PICKLES:
        raise InputError(
            f"{path}: weights in pickle files are refused, because loading them runs code; get them as safetensors"
        )
    if path.suffix == ".safetensors":
        raise InputError(
            f"{path}: is a checkpoint in one file, or a LoRA; make a diffusers folder of it once (docs/exports.md, "
            "Starting from other files)"
        )


def _refuse_quantised(config: dict[str, Any], file: Path) -> None:
    """Raises `InputError` for weights that were saved quantised: gradients do not reach them, and a LoRA on them is
    none for the published model."""
    method = config.get("quantization_config")
    if method:
        kind = method.get("quant_method") if isinstance(method, dict) else method
        raise InputError(
            f"{file}: quantization_config says that the weights are quantised ({kind!r:.40}); give the original "
            "checkpoint (generator.quantize: int8 saves memory under a LoRA)"
        )


def _check_component(folder: Path, cls: str) -> None:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: the folder is missing, but model_index.json lists it ({cls}); copy the checkpoint again"
        )
    if "Scheduler" in cls:
        read_json(folder / "scheduler_config.json")
    elif "Tokenizer" in cls:
        if not any(folder.iterdir()):
            raise InputError(f"{folder}: holds no tokenizer files; copy the checkpoint again")
    elif "Processor" in cls or "FeatureExtractor" in cls:
        if not any(folder.glob("*.json")):
            raise InputError(f"{folder}: holds no processor settings; copy the checkpoint again")
    else:
        config = read_json(folder / "config.json")
        check_kernels(config, folder / "config.json")
        _refuse_quantised(config, folder / "config.json")
        _check_weights(folder)


def _check_weights(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise InputError(
                f"{folder / pickles[0]}: weights in pickle files are refused, because loading them "
                "runs code; convert once "
                "with DiffusionPipeline.from_pretrained(old).save_pretrained(new, safe_serialization=True)"
            )
        raise InputError(f"{folder}: holds no .safetensors weights; copy the checkpoint again")
    if not any((folder / f"{name}{end}").exists() for name in _WEIGHTS for end in ("", ".index.json")):
        raise InputError(
            f"{folder / files[0].name}: is not loaded under that name; weights must be {' or '.join(_WEIGHTS)}, so "
            "rename a variant such as .fp16.safetensors (its index file too), or save the checkpoint without variant"
        )
    for index in folder.glob("*.safetensors.index.json"):
        places = read_json(index).get("weight_map", {})
        shards = {str(name) for name in places.values()} if isinstance(places, dict) else set()
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise InputError(f"{folder / missing[0]}: this part of the weights is missing; copy the checkpoint again")
    for file in files:
        check_safetensors(file)


def lora_files(folder: Path) -> list[Path]:
    """The weight files of an exported LoRA: in the folder itself, and in one folder per further component."""
    paths = [folder / LORA_FILE]
    if (folder / "README.md").exists():  # a run's folder contains an export, but is none
        paths += [part / name for part in sorted(folder.iterdir()) for name in (LORA_FILE, ADAPTER_FILE)]
    return [path for path in paths if path.is_file()]


def styled_files(folder: Path) -> list[Path]:
    """The files of an exported LoRA in another key style: `kohya.safetensors`, `kohya_transformer_2.safetensors` …"""
    return [path for style in STYLES for path in sorted(folder.glob(f"{style}*.safetensors")) if path.is_file()]


def check_lora(files: list[Path]) -> None:
    """Whole safetensors, with settings that hold nothing but a LoRA's. Raises `InputError` naming the file."""
    for file in files:
        metadata = check_safetensors(file).get("__metadata__") or {}
        if "lora_adapter_metadata" in metadata:  # diffusers makes PEFT's config of it
            settings, where = metadata["lora_adapter_metadata"], f"{file}: lora_adapter_metadata"
            if isinstance(settings, str):
                settings = parse_json(settings, where, "export the LoRA again", lenient=True)
            check_lora_settings(settings, where)
        if file.name == ADAPTER_FILE:
            settings = read_json(file.parent / "adapter_config.json")
            check_lora_settings(settings, str(file.parent / "adapter_config.json"))
            if settings.get("peft_type") != "LORA":
                raise InputError(f"{file.parent / 'adapter_config.json'}: has no peft_type LORA; export the LoRA again")


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files directly in `folder`."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
