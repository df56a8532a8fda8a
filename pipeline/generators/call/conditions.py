"""Conditions that a prompt brings besides text (images, videos, class labels), and stand-ins for them in a probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.errors import InputError
from pipeline.core.media import read_media
from pipeline.core.media_kinds import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from pipeline.core.pictures import open_picture
from pipeline.core.types import PromptItem
from pipeline.generators.call.signature import parameters_of

# Optional arguments that condition the picture, in the order in which a probe without prompts passes them.
_OPTIONAL_CONDITIONS = (
    "image",
    "mask_image",
    "control_image",
    "control_mask",
    "video",
    "control_video",
    "conditioning_frames",
)
PER_TAKE = ("class_labels",)  # numbers of which a pipeline needs one per take


def condition_arguments(pipe: Any) -> list[list[str]]:
    """Sets of condition arguments for a probe without prompts to make up: first the required and usual ones, then only
    the required ones, then each of the usual ones alone (an image or a video), then with a ControlNet union's mode."""
    parameters = parameters_of(pipe)
    required = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and stand_in(name, 8, 8, 1) is not None
    ]
    optional = [name for name in _OPTIONAL_CONDITIONS if name in parameters and name not in required]
    options = [required + optional, required] + [[*required, name] for name in optional if len(optional) > 1]
    if "control_mode" in parameters and "control_mode" not in required:
        options.append([*required, *optional, "control_mode"])
    return options if optional else [required]


def stand_in(name: str, height: int, width: int, frames: int) -> Any:
    """A made-up value for a condition argument, by its name; None where the name does not tell what it is."""
    if "embed" in name or "latent" in name:
        return None
    if "mask" in name:
        half = np.zeros((height, width), np.uint8)
        half[:, width // 2 :] = 255
        mask = Image.fromarray(half, "L")
        return [mask] * frames if "video" in name else mask
    rows = np.linspace(40, 220, height)[:, None, None]
    columns = np.linspace(0, 30, width)[None, :, None]
    picture = np.broadcast_to(rows + columns * np.array([1.0, 0.5, -1.0]), (height, width, 3))
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    if "video" in name or name in ("conditioning_frames", "frames"):
        return [image] * frames
    if "image" in name:
        return image
    return 0 if name in (*PER_TAKE, "control_mode") else None


def conditions_of(prompt: PromptItem) -> dict[str, Any]:
    """What a prompt brings besides text: its `image`, and `metadata["conditions"]` (argument -> file or value)."""
    conditions = dict(prompt.metadata.get("conditions", {}))
    if prompt.image:
        conditions.setdefault("image", prompt.image)
    return conditions


def condition_key(prompt: PromptItem) -> str:
    """Equal for prompts with equal conditions."""
    return repr(sorted(conditions_of(prompt).items()))


def condition_values(
    name: str, conditions: Sequence[dict[str, Any]], height: int, width: int, frames: int, resize: bool
) -> list[Any]:
    """The values of one condition argument for several prompts, loaded, made up where a prompt lacks them.

    `resize`: to `height` and `width`, for pipelines that take their size from the condition. Raises InputError.
    """
    values = []
    for given in conditions:
        value = _load(name, given[name]) if name in given else None
        if value is None:
            value = stand_in(name, height, width, frames)
        values.append(_resized(value, height, width) if resize else value)
    return values


def _load(name: str, value: Any) -> Any:
    """The pictures of a file; other values as they are."""
    if not isinstance(value, (str, Path)):
        return value
    path = Path(value)
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        return value
    try:
        if suffix in IMAGE_SUFFIXES:
            return open_picture(path).convert("L" if "mask" in name else "RGB")
        return [Image.fromarray(frame) for frame in read_media(path).frames[0]]
    except InputError as error:
        raise InputError(f"condition {name}: {error}") from error


def _resized(value: Any, height: int, width: int) -> Any:
    if isinstance(value, list):
        return [_resized(entry, height, width) for entry in value]
    return value.resize((width, height)) if hasattr(value, "resize") and hasattr(value, "size") else value
