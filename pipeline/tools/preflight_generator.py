"""Preflight rules about the generator: a local checkpoint is complete and fits the config's sizes and sampler."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.core.code_names import pipeline_names
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.files import did_you_mean
from pipeline.core.prompts import check_prompt_lengths
from pipeline.core.types import PromptItem
from pipeline.generators.call.signature import FRAMES
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
    """Height, width and frames are what the VAE, the transformer's patches and the pipeline itself can make: they would
    round other sizes, or refuse them."""
    vae = read_json(folder / "vae" / "config.json") if "vae" in components else {}
    pipeline = _pipeline_name(cfg, folder)
    spatial = _spatial_factor(vae)
    if spatial is not None:
        patch = _patch_size(folder) if "transformer" in components else 1
        unit, reason = spatial * patch, f"VAE {spatial} x patch {patch}"
        stated = _stated_unit(pipeline) if unit % 16 else None
        if stated is not None and math.lcm(unit, stated) > unit:
            unit, reason = math.lcm(unit, stated), f"{reason}, and {pipeline} takes multiples of {stated}"
        for key, value in (("height", cfg.generator.height), ("width", cfg.generator.width)):
            if value % unit:
                below, above = value // unit * unit, (value // unit + 1) * unit
                raise ConfigError(
                    f"generator.{key}: found {value}; {folder} needs a multiple of {unit} ({reason}), such as "
                    f"{below or above} or {above if below else above + unit}"
                )
    step, frames = _temporal_factor(vae), cfg.generator.num_frames
    if step is not None and (frames - 1) % step:
        below = (frames - 1) // step * step + 1
        raise ConfigError(
            f"generator.num_frames: found {frames}; {folder} needs {step} n + 1, such as {below} or {below + step}"
        )
    if frames > 1 and step is None and not _takes_frames(pipeline):
        raise ConfigError(f"generator.num_frames: found {frames}; {pipeline} makes single images, so set 1")


def _factor(value: Any) -> int | None:
    """A whole number of at least 1, else None: configs of checkpoints may hold anything."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < 1024 and value == int(value)
    return int(value) if whole else None


def _spatial_factor(vae: dict[str, Any]) -> int | None:
    """Pixels a side of a latent position; None where the VAE's config does not tell."""
    stated = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    channels, downsample = vae.get("block_out_channels"), vae.get("temperal_downsample")
    if stated is not None:
        return _factor(stated)
    if isinstance(channels, list) and 0 < len(channels) < 10:
        return 2 ** (len(channels) - 1)
    return 2 ** len(downsample) if isinstance(downsample, list) and len(downsample) < 10 else None


def _temporal_factor(vae: dict[str, Any]) -> int | None:
    """Frames of a latent frame; None for the VAE of an image model."""
    stated = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    downsample = vae.get("temperal_downsample")
    if stated is not None:
        return _factor(stated)
    return 2 ** sum(map(bool, downsample)) if isinstance(downsample, list) and len(downsample) < 10 else None


def _pipeline_name(cfg: Config, folder: Path) -> str:
    name = cfg.generator.pipeline or read_json(folder / "model_index.json").get("_class_name")
    return name if isinstance(name, str) else ""


@functools.cache
def _pipeline_source(name: str) -> str:
    """The text of a pipeline class in the installed diffusers, from its `class` on; '' for an unknown one. diffusers is
    not imported, which would take seconds."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None or name not in pipeline_names():
        return ""
    for file in (Path(spec.origin).parent / "pipelines").rglob("pipeline_*.py"):
        text = file.read_text("utf-8")
        if (start := text.find(f"\nclass {name}(")) >= 0:
            return text[start:]
    return ""


def _stated_unit(pipeline: str) -> int | None:
    """The number that a pipeline's own check of its arguments wants height and width to be a multiple of."""
    match = re.search(r"height % (\d+) != 0", _pipeline_source(pipeline))
    return _factor(int(match[1])) if match else None


def _takes_frames(pipeline: str) -> bool:
    """Whether a pipeline is told how many frames to make; an unknown one may be."""
    match = re.search(r"def __call__\((.*?)\n    \)", _pipeline_source(pipeline), re.DOTALL)
    return match is None or re.search(rf"^\s+({'|'.join(FRAMES)})\b", match[1], re.MULTILINE) is not None


def _patch_size(folder: Path) -> int:
    """Latent positions a side of the transformer's patches."""
    size = read_json(folder / "transformer" / "config.json").get("patch_size", 1)
    return _factor(size[-1] if isinstance(size, list) and size else size) or 1


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
