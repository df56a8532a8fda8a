"""Preflight rules about the generator: a local checkpoint is complete and fits the config's sizes and sampler."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.core.code_names import pipeline_names
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.files import did_you_mean
from pipeline.core.prompts import check_prompt_lengths
from pipeline.core.types import PromptItem
from pipeline.generators.checkpoint_files import DENOISERS, check_diffusers_folder, is_local, read_json
from pipeline.rl.samplers import samplers_for

_FLOW_CLASSES = ("FlowMatch",)


def check_generator(cfg: Config, train: list[PromptItem], heldout: list[PromptItem]) -> dict[str, str]:
    """Checks that a local folder is complete and fits the configured sizes. Returns its components; {} for a hub id."""
    _check_pipeline_name(cfg.generator.pipeline)
    if not is_local(cfg.generator.pretrained):
        return {}
    folder = Path(cfg.generator.pretrained).expanduser()
    try:
        components = check_diffusers_folder(folder, cfg.generator.pipeline is None)
    except InputError as error:
        raise InputError(f"generator.pretrained: {error}") from None
    if not set(DENOISERS) & set(components):
        raise ConfigError(
            f"generator.pretrained: {folder} has none of {', '.join(DENOISERS)} (components: "
            f"{', '.join(components)}); only diffusion pipelines can be trained"
        )
    _check_sizes(cfg, folder, components)
    _check_scheduler(cfg, folder, components)
    for prompts, path in ((train, cfg.prompts.train), (heldout, cfg.prompts.heldout)):
        check_prompt_lengths(prompts, str(folder), cfg.generator.call_kwargs, path)
    return components


def check_quantize(cfg: Config) -> None:
    """Raises `ConfigError` where the package for `generator.quantize` is missing."""
    if cfg.generator.quantize != "none" and importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"generator.quantize: {cfg.generator.quantize} needs the package torchao; pip install 'rushes[quantize]', "
            "or use none"
        )


def _check_pipeline_name(name: str | None) -> None:
    """Raises `ConfigError` for a class that diffusers does not have; diffusers is not imported."""
    if name is None:
        return
    if name not in pipeline_names():
        hint = did_you_mean(name, sorted(pipeline_names()))
        hint = hint or "; it must be one of diffusers' own, such as LTXImageToVideoPipeline"
        raise ConfigError(f"generator.pipeline: diffusers has no pipeline class {name!r}{hint}")


def _check_sizes(cfg: Config, folder: Path, components: dict[str, str]) -> None:
    """Height, width and frames are multiples of what the VAE and the transformer's patches need."""
    if "vae" not in components:
        return
    vae = read_json(folder / "vae" / "config.json")
    spatial = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    if spatial is None and isinstance(vae.get("block_out_channels"), list):
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
    if isinstance(spatial, int | float):
        patch = _patch_size(folder) if "transformer" in components else 1
        unit = int(spatial) * patch
        for key, value in (("height", cfg.generator.height), ("width", cfg.generator.width)):
            if value % unit:
                below, above = value // unit * unit, (value // unit + 1) * unit
                raise ConfigError(
                    f"generator.{key}: found {value}; {folder} needs a multiple of {unit} (VAE {int(spatial)} x patch "
                    f"{patch}), such as {below or above} or {above if below else above + unit}"
                )
    temporal = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    frames = cfg.generator.num_frames
    if isinstance(temporal, int | float) and (frames - 1) % int(temporal):
        step = int(temporal)
        below = (frames - 1) // step * step + 1
        raise ConfigError(
            f"generator.num_frames: found {frames}; {folder} needs {step} n + 1, such as {below} or {below + step}"
        )


def _patch_size(folder: Path) -> int:
    """Latent positions a side of the transformer's patches."""
    size = read_json(folder / "transformer" / "config.json").get("patch_size", 1)
    size = size[-1] if isinstance(size, list) and size else size
    return size if isinstance(size, int) else 1


def _check_scheduler(cfg: Config, folder: Path, components: dict[str, str]) -> None:
    """The sampler fits what the model predicts."""
    if "scheduler" not in components:
        return
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    is_flow = (
        components["scheduler"].startswith(_FLOW_CLASSES)
        or scheduler.get("prediction_type") == "flow_prediction"
        or bool(scheduler.get("use_flow_sigmas"))
    )
    prediction = "flow" if is_flow else scheduler.get("prediction_type")
    fitting = samplers_for(str(prediction), components["scheduler"])
    if fitting and cfg.sampler.kind not in fitting:
        raise ConfigError(
            f"sampler.kind: {cfg.sampler.kind} does not fit {folder}, which predicts {prediction} "
            f"({components['scheduler']}); use {' or '.join(fitting)}"
        )
