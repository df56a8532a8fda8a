"""Loads processors for text and pictures (Qwen2-VL and similar) where torchvision is not installed.

In transformers they include a video processor, which alone needs torchvision and which an image pipeline never uses.
Its settings are kept as they are, and pictures are prepared by transformers' PIL backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any


class VideoSettings(dict):
    """A video processor's settings in its place: saved with the processor, and not used otherwise."""

    _auto_class = None  # transformers reads it from every part when it saves


def processors_without_torchvision(
    index: Mapping[str, Any], pretrained: str, revision: str | None = None
) -> dict[str, Any]:
    """Component name -> processor, for `DiffusionPipeline.from_pretrained(**…)`; empty where torchvision is installed.

    `index`: the checkpoint's model_index.json. Raises what transformers raises where the files are not there.
    """
    if find_spec("torchvision") is not None:
        return {}
    processors = {}
    for name, entry in index.items():
        if isinstance(entry, (list, tuple)) and len(entry) == 2 and entry[0] == "transformers":
            cls = without_video(entry[1])
            if cls is not None:
                processors[name] = cls.from_pretrained(pretrained, subfolder=name, revision=revision)
    return processors


def without_video(name: str) -> Any:
    """transformers' processor class of that name, with settings for a video processor; None where it has none."""
    import transformers
    from transformers.processing_utils import ProcessorMixin

    named = getattr(transformers, name, None)
    if not (isinstance(named, type) and issubclass(named, ProcessorMixin)):
        return None
    base: Any = named  # transformers' classes count as untyped
    if "video_processor" not in base.get_attributes():
        return None
    loaders = {"image_processor": transformers.AutoImageProcessor, "tokenizer": transformers.AutoTokenizer}

    def check(self: Any, argument: str, value: Any) -> Any:
        if not isinstance(value, VideoSettings):
            base.check_argument_for_proper_class(self, argument, value)

    def parts(cls: Any, pretrained: str, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        loaded = {
            part: loaders[part].from_pretrained(pretrained, **{**kwargs, "trust_remote_code": False})
            for part in cls.get_attributes()
            if part in loaders
        }
        # As transformers names it where a checkpoint does not.
        video = type(loaded["image_processor"]).__name__.split("ImageProcessor")[0] + "VideoProcessor"
        settings = VideoSettings((processor_dict or {}).get("video_processor") or {"video_processor_type": video})
        return [loaded.get(part, settings if part == "video_processor" else None) for part in cls.get_attributes()]

    overrides = {
        "__module__": base.__module__,
        "check_argument_for_proper_class": check,
        "_get_arguments_from_pretrained": classmethod(parts),
    }
    return type(name, (base,), overrides)
