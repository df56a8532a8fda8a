"""What cannot be found by probing, per pipeline class. An entry is the exception: every field is optional."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import GeneratorConfig


def _nothing(_: GeneratorConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Quirk:
    """`call`: further arguments of the pipeline's __call__ (generator.call_kwargs overrides them). `prepare`: what has
    to be done to the pipeline before it runs at all. `refuse`: why this class cannot be a policy, where running it
    would not show it."""

    call: Callable[[GeneratorConfig], dict[str, Any]] = _nothing
    prepare: Callable[[Any], None] | None = None
    refuse: str = ""


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
