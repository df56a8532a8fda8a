"""The arguments of a pipeline's `__call__` for a batch of takes.

A call mode says how a batch is passed to the pipeline; the probe tries them in order until one works.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.config.schema import GeneratorConfig
from pipeline.core.types import PromptItem, SamplingSpec
from pipeline.generators.call.conditions import PER_TAKE, condition_values, conditions_of
from pipeline.generators.call.quirks import quirk_for
from pipeline.generators.call.signature import FRAMES, parameters_of


@dataclass(frozen=True, slots=True)
class CallMode:
    """How a batch of takes is passed to a pipeline."""

    batched: bool = True  # many prompts in a call; else one
    shared: bool = (
        True  # one condition for the whole call (a group's takes share theirs); else a list with one per take
    )
    negative: bool = False  # a negative prompt is always passed, even if empty

    def describe(self) -> str:
        empty = ", an empty negative prompt" if self.negative else ""
        if not self.batched:
            return "one take a call" + empty
        return "many takes a call" + (", one condition for all" if self.shared else ", a condition each") + empty

    def to_dict(self) -> dict[str, bool]:
        return asdict(self)


def call_modes(conditioned: bool, negative: bool = False) -> list[CallMode]:
    """The modes to try, in order. `negative`: the pipeline takes negative prompts, and some do not run without one."""
    modes = [CallMode(), CallMode(batched=False)]
    if conditioned:
        modes.insert(1, CallMode(shared=False))
    return modes + ([replace(mode, negative=True) for mode in modes] if negative else [])


def requested_steps(pipe: Any, cfg: GeneratorConfig, steps: int) -> int:
    """The num_inference_steps for a pipeline to take `steps` steps: image-to-image runs int(steps x strength)."""
    parameter = parameters_of(pipe).get("strength")
    strength = cfg.call_kwargs.get("strength", parameter.default if parameter is not None else 1.0)
    if not isinstance(strength, (int, float)) or not 0.0 < strength < 1.0:
        return steps
    requested = math.ceil(steps / strength)
    while min(int(requested * strength), requested) < steps:
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

    `placeholders`: conditions that are made up where a prompt lacks them. Raises InputError where a prompt's condition
    cannot be read.
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
        kwargs["use_resolution_binning"] = False  # keep the height and width that the config says
    kwargs["use_kv_cache"] = False  # denoiser calls must not depend on earlier ones
    kwargs.update(quirk_for(pipe).call(cfg))
    true_scale = cfg.call_kwargs.get(
        "true_cfg_scale", kwargs.get("true_cfg_scale", true_cfg.default if true_cfg else None)
    )
    needs_negative = isinstance(true_scale, (int, float)) and true_scale > 1.0  # else these do not guide
    if needs_negative or mode.negative or any(prompt.negative for prompt in prompts):
        negative = [prompt.negative or (" " if needs_negative else "") for prompt in prompts]
        kwargs["negative_prompt"] = negative if mode.batched else negative[0]
    conditions = [conditions_of(prompt) for prompt in prompts]
    for name in dict.fromkeys([*(name for given in conditions for name in given), *placeholders]):
        values = condition_values(
            name,
            conditions[:1] if mode.shared else conditions,
            cfg.height,
            cfg.width,
            cfg.num_frames,
            resize="height" not in parameters,
        )
        if name in PER_TAKE:
            kwargs[name] = values * len(prompts) if mode.shared else values
        else:
            kwargs[name] = values[0] if mode.shared or not mode.batched else values
    kwargs = {name: value for name, value in kwargs.items() if name in parameters}
    return {**kwargs, **cfg.call_kwargs}
