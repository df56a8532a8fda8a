"""Loads diffusers checkpoints: whole pipelines for rollouts, bare denoisers for the learner. Safetensors only."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from pipeline.config.schema import GeneratorConfig, TrainableConfig
from pipeline.core.code_names import check_model_index, check_own_code, component_class, never_ask_to_run_code
from pipeline.core.devices import resolve_dtype
from pipeline.core.errors import ConfigError, InputError, UnsupportedPolicyError, one_line
from pipeline.core.library_messages import silence_libraries
from pipeline.generators.checkpoint_files import CONTROLNET, DENOISERS
from pipeline.generators.load.processors import processors_without_torchvision

# Packages that a message may tell the user to install: diffusers and transformers name them themselves. Any other name
# in an error may have come from the checkpoint.
_ADVISED = frozenset(
    "accelerate beautifulsoup4 bitsandbytes blobfile cosmos-guardrail einops ftfy gguf invisible-watermark k-diffusion "
    "librosa note-seq onnxruntime opencv-python optimum-quanto peft pillow protobuf scipy sentencepiece tiktoken timm "
    "torchao torchaudio torchsde torchvision".split()
)
_CANNOT_LOAD = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    AttributeError,
    TypeError,
    NameError,
)


def _explain(cfg: GeneratorConfig, error: Exception) -> InputError:
    where = "folder" if Path(cfg.pretrained).is_dir() else "hub id"
    cause = f"{type(error).__name__}: {one_line(error, 400)}"
    package = missing_package(error)
    if package is None:
        cause = re.sub(r"`?pip install [^`;,)]*`?", "(…)", cause)
    if package is not None:
        return InputError(
            f"generator.pretrained: the {where} {cfg.pretrained!r} needs the package {package}, which is not installed "
            f"here: pip install {package} ({cause})"
        )
    return InputError(
        f"generator.pretrained: the {where} {cfg.pretrained!r} could not be loaded as a diffusers pipeline ({cause}); "
        "it needs model_index.json and safetensors weights of every component"
    )


def missing_package(error: Exception) -> str | None:
    """The package that is missing according to an exception of diffusers or transformers; None where it names none, or
    none that they depend on."""
    if isinstance(error, NameError):  # diffusers imports what needs torchvision only where it is installed
        return None if find_spec("torchvision") else "torchvision"
    if not isinstance(error, ImportError):
        return None
    for pattern in (r"pip install ([\w.\[\]-]+)", r"requires the ([\w-]+) library", r"No module named '(\w+)"):
        match = re.search(pattern, str(error))
        if match:
            package = match[1].lower().strip(".")
            return package if package.replace("_", "-") in _ADVISED else None
    return None


def load_pipeline(
    cfg: GeneratorConfig, device: torch.device, skip: Sequence[str] = (), place: bool = True
) -> DiffusionPipeline:
    """The checkpoint's own pipeline class (or `cfg.pipeline`), in evaluation mode, on `device`.

    `skip`: components that are left out (None). `place`: False leaves it on the CPU, in the dtype for `device`.
    Raises InputError naming the checkpoint. Weights must be safetensors; remote code is never run.
    """
    silence_libraries()
    quantised = _quantised_pipeline(cfg)
    # diffusers refuses a checkpoint that was saved without a component (SD3's third encoder) unless None is passed.
    index = model_index(cfg)
    absent = [name for name, entry in index.items() if entry in ([None, None], (None, None))]
    cls = pipeline_class(cfg, index)
    _check_required(cls, index, cfg)
    never_ask_to_run_code()
    try:
        pipe = cls.from_pretrained(
            cfg.pretrained,
            revision=cfg.revision,
            dtype=resolve_dtype(cfg.dtype, device.type),
            use_safetensors=True,
            **{
                **processors_without_torchvision(index, cfg.pretrained, cfg.revision),
                **dict.fromkeys([*absent, *skip]),
                **quantised,
            },
        )
    except _CANNOT_LOAD as error:
        raise _explain(cfg, error) from error
    for name in skip:
        setattr(pipe, name, None)  # optional components are loaded although None was passed
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    if place:
        pipe.to(device)
    if device.type == "cpu" and isinstance(vae := pipe.components.get("vae"), torch.nn.Module):
        channels_last(vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def channels_last(vae: torch.nn.Module) -> None:
    """Stores the weights of 3-D convolutions in the layout of the CPU's kernels, which would otherwise transpose every
    activation twice: a video VAE decodes in two thirds of the time or less. Equal values up to rounding."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def pipeline_class(cfg: GeneratorConfig, index: Mapping[str, Any] | None = None) -> type[DiffusionPipeline]:
    """The class that loads the checkpoint: `generator.pipeline`, else the one that its `index` names.

    Raises ConfigError where diffusers has none of that name.
    """
    if cfg.pipeline is None and index is None:
        return DiffusionPipeline
    import diffusers

    name = cfg.pipeline or str((index or {}).get("_class_name"))
    cls = getattr(diffusers, name, None)
    if cfg.pipeline is None and hasattr(cls, "_backends"):
        return DiffusionPipeline  # its error says which packages the class needs
    if not (isinstance(cls, type) and issubclass(cls, DiffusionPipeline)):
        where = "generator.pipeline" if cfg.pipeline else f"{cfg.pretrained}/model_index.json: _class_name"
        raise ConfigError(f"{where}: diffusers has no pipeline class {name!r}; use one of its own")
    return cls


def denoisers_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The modules that the sampler steps call, by component name. Raises UnsupportedPolicyError if there is none."""
    denoisers = {name: pipe.components[name] for name in DENOISERS if pipe.components.get(name) is not None}
    if not denoisers:
        raise UnsupportedPolicyError(
            f"{type(pipe).__name__} has none of the components {', '.join(DENOISERS)}; there is nothing to train"
        )
    return denoisers


def controlnets_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The modules whose outputs the denoisers are given at each step, by component name."""
    return {
        name: module
        for name, module in sorted(pipe.components.items())
        if name.startswith(CONTROLNET) and isinstance(module, torch.nn.Module)
    }


def replayed_modules(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """All modules that replay calls: the denoisers, and what feeds them. Raises UnsupportedPolicyError."""
    return {**denoisers_of(pipe), **controlnets_of(pipe)}


def text_encoders_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The text encoders by component name; empty where a pipeline has none."""
    return {
        name: module
        for name, module in sorted(pipe.components.items())
        if name.startswith("text_encoder") and isinstance(module, torch.nn.Module)
    }


def trained_modules(pipe: DiffusionPipeline, cfg: TrainableConfig) -> dict[str, torch.nn.Module]:
    """What `trainable.modules` names, by component name. Raises UnsupportedPolicyError if there is none."""
    if cfg.modules == "controlnet":
        if not (controlnets := controlnets_of(pipe)):
            raise UnsupportedPolicyError(
                f"trainable.modules: {cfg.modules} needs a ControlNet, but {type(pipe).__name__} has none; use denoiser"
            )
        return controlnets
    denoisers = {} if cfg.modules == "text_encoder" else denoisers_of(pipe)
    encoders = text_encoders_of(pipe) if cfg.trains_text else {}
    if cfg.trains_text and not encoders:
        raise UnsupportedPolicyError(
            f"trainable.modules: {cfg.modules} needs text encoders, but {type(pipe).__name__} has none; use denoiser"
        )
    return {**denoisers, **encoders}


def _quantised(cfg: GeneratorConfig) -> Any:
    """diffusers' config for int8 weights. Raises ConfigError where torchao is missing."""
    from diffusers import TorchAoConfig

    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError:
        raise ConfigError(
            f"generator.quantize: {cfg.quantize} needs the package torchao; pip install 'rushes[quantize]', or use none"
        ) from None
    return TorchAoConfig(Int8WeightOnlyConfig())


def _quantised_pipeline(cfg: GeneratorConfig) -> dict[str, Any]:
    """The `from_pretrained` arguments that quantise the denoisers of a whole pipeline."""
    if cfg.quantize == "none":
        return {}
    from diffusers import PipelineQuantizationConfig

    index = model_index(cfg)
    present = [name for name in DENOISERS if (index.get(name) or [None])[0] is not None]
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=dict.fromkeys(present, _quantised(cfg)))}


def model_index(cfg: GeneratorConfig) -> dict[str, Any]:
    """model_index.json, with classes of diffusers and transformers only. Raises InputError naming the checkpoint."""
    try:
        index = dict(DiffusionPipeline.load_config(cfg.pretrained, revision=cfg.revision))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise _explain(cfg, error) from error
    components = check_model_index(index, f"{cfg.pretrained}/model_index.json", own_class=cfg.pipeline is None)
    check_own_code(Path(cfg.pretrained), components)
    return index


def _check_required(cls: type[DiffusionPipeline], index: Mapping[str, Any], cfg: GeneratorConfig) -> None:
    """Checks that every component's entry is a pair: diffusers unpacks any value, even a text of two letters.

    Raises InputError.
    """
    required = [name for name, p in inspect.signature(cls.__init__).parameters.items() if p.default is p.empty]
    for name in [*required, *cls._optional_components]:
        if not isinstance(index.get(name), (list, tuple, type(None))):
            raise InputError(
                f"{cfg.pretrained}/model_index.json: {name} is {index[name]!r:.80}; expected [library, class]; copy "
                "the checkpoint again"
            )


def load_component(cfg: GeneratorConfig, name: str, dtype: torch.dtype) -> torch.nn.Module | None:
    """One component of a checkpoint, on the CPU; None where it has none of that name. Raises InputError."""
    library, cls = model_index(cfg).get(name) or (None, None)
    if library is None or cls is None:
        return None
    quantised = {"quantization_config": _quantised(cfg)} if name in DENOISERS and cfg.quantize != "none" else {}
    factory = component_class(library, cls, f"{cfg.pretrained}/model_index.json: {name}")
    never_ask_to_run_code()
    try:
        return factory.from_pretrained(
            cfg.pretrained,
            subfolder=name,
            revision=cfg.revision,
            dtype=dtype,
            use_safetensors=True,
            **quantised,
        )
    except _CANNOT_LOAD as error:
        raise _explain(cfg, error) from error


def load_denoisers(cfg: GeneratorConfig, device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Only the denoisers of a checkpoint, and the ControlNets that feed them: the learner needs neither text encoders
    nor VAE."""
    feeding = sorted(name for name in model_index(cfg) if name.startswith(CONTROLNET))
    components = {name: load_component(cfg, name, dtype) for name in (*DENOISERS, *feeding)}
    modules = {name: module for name, module in components.items() if module is not None}
    if not set(modules) & set(DENOISERS):
        raise UnsupportedPolicyError(f"{cfg.pretrained}: no {' / '.join(DENOISERS)} in model_index.json")
    for module in modules.values():
        module.eval().requires_grad_(False).to(device)
    return modules
