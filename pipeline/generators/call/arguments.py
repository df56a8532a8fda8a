"""How a pipeline is called: argument names, conditioning images and videos, and its pictures as uint8 frames.

A mode says how a batch of takes is put to the pipeline; `Policy.probe` tries them in order until one works.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import GeneratorConfig
from pipeline.core.errors import InputError, RushesError
from pipeline.core.safe_paths import check_regular
from pipeline.core.types import PromptItem, SamplingSpec
from pipeline.generators.call.quirks import quirk_for

# Optional arguments that are conditions on the picture, in the order they are offered in a probe without prompts.
_OPTIONAL_CONDITIONS = (
    "image",
    "mask_image",
    "control_image",
    "control_mask",
    "video",
    "control_video",
    "conditioning_frames",
)
_PER_TAKE = ("class_labels",)  # numbers of which a pipeline wants one for each take
_PICTURES = ("frames", "images", "videos", "video", "image", "rgb")  # what pipelines call them in their output
FRAMES = ("num_frames", "video_length", "frames")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_VIDEO_SUFFIXES = {".mp4", ".webm", ".mov", ".mkv"}


@dataclass(frozen=True, slots=True)
class CallMode:
    """`batched`: many prompts in a call; else one. `shared`: one condition for the whole call (a group's takes share
    theirs); else a list with one per take. `negative`: a negative prompt is always given, if only an empty one."""

    batched: bool = True
    shared: bool = True
    negative: bool = False

    def describe(self) -> str:
        empty = ", an empty negative prompt" if self.negative else ""
        if not self.batched:
            return "one take a call" + empty
        return "many takes a call" + (", one condition for all" if self.shared else ", a condition each") + empty


def call_modes(conditioned: bool, negative: bool = False) -> list[CallMode]:
    """What to try, in order. `negative`: the pipeline takes negative prompts, and some do not run without one."""
    found = [CallMode(), CallMode(batched=False)]
    if conditioned:
        found.insert(1, CallMode(shared=False))
    return found + ([replace(mode, negative=True) for mode in found] if negative else [])


def parameters_of(pipe: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(pipe.__call__).parameters)


def condition_arguments(pipe: Any) -> list[list[str]]:
    """Condition arguments to make up in a probe without prompts: first the required and usual ones, then only the
    required ones, then each of the usual ones by itself (an image or a video), then with a ControlNet union's mode."""
    parameters = parameters_of(pipe)
    required = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and made_up(name, 8, 8, 1) is not None
    ]
    optional = [name for name in _OPTIONAL_CONDITIONS if name in parameters and name not in required]
    options = [required + optional, required] + [[*required, name] for name in optional if len(optional) > 1]
    if "control_mode" in parameters and "control_mode" not in required:
        options.append([*required, *optional, "control_mode"])
    return options if optional else [required]


def made_up(name: str, height: int, width: int, frames: int) -> Any:
    """A stand-in for a condition argument, by its name; None where the name says nothing."""
    from PIL import Image

    rows = np.linspace(40, 220, height)[:, None, None]
    columns = np.linspace(0, 30, width)[None, :, None]
    picture = np.broadcast_to(rows + columns * np.array([1.0, 0.5, -1.0]), (height, width, 3))
    if "embed" in name or "latent" in name:
        return None
    if "mask" in name:
        half = np.zeros((height, width), np.uint8)
        half[:, width // 2 :] = 255
        mask = Image.fromarray(half, "L")
        return [mask] * frames if "video" in name else mask
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    if "video" in name or name in ("conditioning_frames", "frames"):
        return [image] * frames
    if "image" in name:
        return image
    return 0 if name in (*_PER_TAKE, "control_mode") else None


def conditions_of(prompt: PromptItem) -> dict[str, Any]:
    """What a prompt brings besides text: its `image`, and `metadata["conditions"]` (argument -> file or value)."""
    given = dict(prompt.metadata.get("conditions", {}))
    if prompt.image:
        given.setdefault("image", prompt.image)
    return given


def condition_key(prompt: PromptItem) -> str:
    """Equal for prompts with equal conditions."""
    return repr(sorted(conditions_of(prompt).items()))


def _load(name: str, value: Any) -> Any:
    if not isinstance(value, (str, Path)):
        return value
    path = Path(value)
    suffix = path.suffix.lower()
    if suffix not in _IMAGE_SUFFIXES | _VIDEO_SUFFIXES:
        return value
    from PIL import Image

    check_regular(path)
    try:
        if suffix in _IMAGE_SUFFIXES:
            return Image.open(path).convert("L" if "mask" in name else "RGB")
        from pipeline.core.media import read_media

        return [Image.fromarray(frame) for frame in read_media(path).frames[0]]
    except OSError as error:
        raise InputError(f"condition {name}: {path} cannot be read ({error})") from error


def _resized(value: Any, height: int, width: int) -> Any:
    if isinstance(value, list):
        return [_resized(entry, height, width) for entry in value]
    return value.resize((width, height)) if hasattr(value, "resize") and hasattr(value, "size") else value


def requested_steps(pipe: Any, cfg: GeneratorConfig, wanted: int) -> int:
    """num_inference_steps that make the pipeline take `wanted` steps: image-to-image runs int(steps x strength)."""
    parameter = parameters_of(pipe).get("strength")
    strength = cfg.call_kwargs.get("strength", parameter.default if parameter is not None else 1.0)
    if not isinstance(strength, (int, float)) or not 0.0 < strength < 1.0:
        return wanted
    requested = math.ceil(wanted / strength)
    while min(int(requested * strength), requested) < wanted:
        requested += 1
    return requested


def call_arguments(
    pipe: Any,
    cfg: GeneratorConfig,
    prompts: Sequence[PromptItem],
    sampling: SamplingSpec,
    mode: CallMode,
    placeholders: Sequence[str] = (),
) -> dict[str, Any]:
    """Arguments of the pipeline's __call__ for these takes.

    `placeholders`: conditions that are made up where a prompt lacks them.
    """
    parameters = parameters_of(pipe)
    texts = [prompt.text for prompt in prompts]
    kwargs: dict[str, Any] = {
        "prompt": texts if mode.batched else texts[0],
        "height": cfg.height,
        "width": cfg.width,
        "num_inference_steps": requested_steps(pipe, cfg, sampling.num_steps),
        "output_type": "np",
    }
    kwargs.update({name: cfg.num_frames for name in FRAMES if name in parameters})
    if "prompt" not in parameters and "batch_size" in parameters:
        kwargs["batch_size"] = len(prompts)
    true_cfg = parameters.get("true_cfg_scale")
    embedded = parameters.get("guidance_scale")
    if true_cfg is not None and (embedded is None or embedded.default is None):
        kwargs["true_cfg_scale"] = sampling.guidance_scale
    elif embedded is not None:
        kwargs["guidance_scale"] = sampling.guidance_scale
        kwargs["guidance_schedule"] = None  # one per step; Ideogram 4 takes either
    if "use_resolution_binning" in parameters:
        kwargs["use_resolution_binning"] = False  # height and width are what the config says
    kwargs["use_kv_cache"] = False  # calls of the denoiser must not depend on earlier ones
    kwargs.update(quirk_for(pipe).call(cfg))
    true_scale = cfg.call_kwargs.get(
        "true_cfg_scale", kwargs.get("true_cfg_scale", true_cfg.default if true_cfg else None)
    )
    needed = isinstance(true_scale, (int, float)) and true_scale > 1.0  # these guide only when given a negative prompt
    if needed or mode.negative or any(prompt.negative for prompt in prompts):
        negative = [prompt.negative or (" " if needed else "") for prompt in prompts]
        kwargs["negative_prompt"] = negative if mode.batched else negative[0]
    conditions = [conditions_of(prompt) for prompt in prompts]
    for name in dict.fromkeys([name for given in conditions for name in given] + list(placeholders)):
        values = []
        for given in conditions[:1] if mode.shared else conditions:
            value = _load(name, given[name]) if name in given else None
            if value is None:
                value = made_up(name, cfg.height, cfg.width, cfg.num_frames)
            values.append(value if "height" in parameters else _resized(value, cfg.height, cfg.width))
        if name in _PER_TAKE:
            kwargs[name] = values * len(prompts) if mode.shared else values
        else:
            kwargs[name] = values[0] if mode.shared or not mode.batched else values
    kwargs = {name: value for name, value in kwargs.items() if name in parameters}
    return {**kwargs, **cfg.call_kwargs}


def to_floats(output: Any, takes: int) -> np.ndarray:
    """A pipeline's output -> float32 [K, F, H, W, 3] in [0, 1]. Raises RushesError where it is no picture, or NaN."""
    values = next((v for v in (getattr(output, name, None) for name in _PICTURES) if v is not None), None)
    if values is None:
        values = output[0] if isinstance(output, (tuple, list)) else output
    if isinstance(values, dict):  # diffusers' outputs are
        raise RushesError(f"the generator's output is a {type(values).__name__} of {', '.join(values)}: no pictures")
    array = _array(values)
    if array.ndim == 6 and array.shape[0] == 1:  # [1, K, F, ...] of pipelines that nest their batches
        array = array[0]
    if array.ndim == 4 and array.shape[0] != takes:  # one take: [F, ...]
        array = array[None]
    if array.ndim == 4:  # images
        array = array[:, None]
    if array.ndim != 5 or array.shape[0] != takes:
        raise RushesError(
            f"the generator's output has shape {list(array.shape)} for {takes} takes; pictures or videos are needed"
        )
    if array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 2 if array.shape[2] in (1, 3, 4) else 1, -1)
    if array.shape[-1] not in (1, 3, 4):
        raise RushesError(f"the generator's output has shape {list(array.shape)}, in which no axis is colour")
    array = np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array[..., :3]
    if not np.isfinite(array).all():
        raise RushesError("the generator's output has NaN or infinity; a lower learning rate or float32 may help")
    return array


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return values.detach().float().cpu().numpy()
    if isinstance(values, (list, tuple)):
        return np.stack([_array(value) for value in values])
    array = np.asarray(values)
    return array.astype(np.float32) / 255.0 if array.dtype == np.uint8 else array.astype(np.float32)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] -> uint8, rounded to the nearest."""
    return np.rint(values.clip(0.0, 1.0) * 255.0).astype(np.uint8)
