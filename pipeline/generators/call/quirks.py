"""What cannot be found by probing, per pipeline class. An entry is the exception: every field is optional."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import GeneratorConfig


def _no_arguments(_: GeneratorConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Quirk:
    """What is special about a pipeline class."""

    call: Callable[[GeneratorConfig], dict[str, Any]] = _no_arguments  # further arguments of its __call__
    prepare: Callable[[Any], None] | None = None  # applied to the pipeline before its first call
    refuse: str = ""  # why this class cannot be a policy, where running it would not show it


def _kontext(cfg: GeneratorConfig) -> dict[str, Any]:
    # Otherwise every picture is made at one of the model's own 1-megapixel sizes, whatever height and width say.
    return {"max_area": cfg.height * cfg.width, "_auto_resize": False}


def _tiled(pipe: Any) -> None:
    pipe.vae.enable_tiling()  # it decodes in no other way


QUIRKS: dict[str, Quirk] = {
    "AllegroPipeline": Quirk(prepare=_tiled),
    "FluxKontextPipeline": Quirk(call=_kontext),
    "FluxKontextInpaintPipeline": Quirk(call=_kontext),
}


def quirk_for(pipe: Any) -> Quirk:
    return QUIRKS.get(type(pipe).__name__, Quirk())
