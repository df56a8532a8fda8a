"""Can a checkpoint be trained, and as what kind of policy? Loads and probes it: `rushes inspect`. Returns plain data.

Sizes that the caller leaves open are chosen small, from the checkpoint's own config, to keep the probe quick.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pipeline.config.schema import Config
from pipeline.core.devices import resolve_device
from pipeline.core.errors import CannotRun, RushesError, UnsupportedPolicyError
from pipeline.generators.call.signature import parameters_of
from pipeline.generators.load.pipeline import denoisers_of, load_pipeline
from pipeline.generators.policy_pipeline import PolicyPipeline
from pipeline.generators.probe.probe import probe
from pipeline.generators.record.first_order import first_order_scheduler, kinds_for
from pipeline.rl.noise_grid import NoiseGrid, noise_of_steps
from pipeline.rl.samplers import get_sampler, stochastic_samplers
from pipeline.tools.checkpoint_summary import components_of, layout_text, lora_of, memory_by_dtype, rule_text
from pipeline.tools.probe_sizes import ProbeSize, probe_sizes

_STEPS = 3  # that a probe samples with
_SAME_FAILURES = 3  # give up after this many sizes that fail for the same reason


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectOptions:
    """How a checkpoint is loaded and probed."""

    revision: str | None = None  # of a hub id
    pipeline: str | None = None  # class to load the checkpoint with, if not its own
    height: int | None = None  # pixels; None: a small size that suits the checkpoint
    width: int | None = None
    num_frames: int | None = None  # None: a short clip, or one picture
    guidance_scale: float | None = None  # None: the pipeline's own default
    steps: int = 10  # sampler steps of training rollouts, whose noise levels are reported
    call: dict[str, Any] = field(default_factory=dict)  # further arguments of the pipeline's call
    device: str = "auto"


def inspect_checkpoint(checkpoint: str, options: InspectOptions | None = None) -> dict[str, Any]:
    """Loads and probes a checkpoint. `trainable` says whether it can be a policy, `reason` why not.

    Raises InputError when it cannot be loaded at all.
    """
    started = time.perf_counter()
    options = options or InspectOptions()
    device = resolve_device(options.device)
    any_sampler = next(iter(stochastic_samplers()))
    pipe = load_pipeline(_config(checkpoint, options, ProbeSize(64, 64, 1), 1.0, any_sampler).generator, device)
    report: dict[str, Any] = {
        "checkpoint": checkpoint,
        "pipeline": type(pipe).__name__,
        "components": components_of(pipe),
        "trainable": False,
        "reason": None,
    }
    report["memory_bytes"] = memory_by_dtype(report["components"])
    try:
        _probe(checkpoint, options, pipe, device, report)
        report["trainable"] = True
    except RushesError as error:
        report["reason"] = str(error)
    report["seconds"] = round(time.perf_counter() - started, 2)
    return report


def _config(checkpoint: str, options: InspectOptions, size: ProbeSize, guidance_scale: float, sampler: str) -> Config:
    """The config that a pipeline is probed with. Its prompts and rewards are placeholders that nothing reads."""
    return Config.model_validate(
        {
            "generator": {
                "pretrained": checkpoint,
                "revision": options.revision,
                "pipeline": options.pipeline,
                "height": size.height,
                "width": size.width,
                "num_frames": size.num_frames,
                "guidance_scale": guidance_scale,
                "call_kwargs": options.call,
            },
            "prompts": {"train": "prompts.txt"},
            "rewards": {"reward": {"scorer": "unused"}},
            "sampler": {"kind": sampler, "noise_level": get_sampler(sampler).default_noise, "steps": options.steps},
        }
    )


def _probe(checkpoint: str, options: InspectOptions, pipe: Any, device: torch.device, report: dict[str, Any]) -> None:
    """Fills the report. Raises RushesError where the checkpoint cannot be a policy."""
    scheduler = getattr(pipe, "scheduler", None)
    prediction = first_order_scheduler(pipe)
    samplers = kinds_for(pipe.scheduler, prediction)
    report["scheduler"] = {
        "checkpoint": None if scheduler is None else type(scheduler).__name__,
        "used": type(pipe.scheduler).__name__,
        "prediction": prediction,
    }
    report["samplers"] = list(samplers)
    modules = denoisers_of(pipe)
    scale = default_guidance(pipe) if options.guidance_scale is None else options.guidance_scale
    steps = _STEPS if getattr(pipe, "guider", None) is None else options.steps  # a guider chooses its rule by the step
    failures: list[RushesError] = []
    for size in probe_sizes(pipe, modules, options.height, options.width, options.num_frames):
        cfg = _config(checkpoint, options, size, scale, samplers[0])
        try:
            result = probe(PolicyPipeline(cfg, pipe, device))
        except RushesError as error:
            if isinstance(error, UnsupportedPolicyError) and not isinstance(error, CannotRun):
                raise _with_alternative(pipe, device, cfg, error) from error
            # It does not run, or gives no pictures: at a larger size or with a longer clip it may.
            failures.append(error)
            if len({str(e) for e in failures}) == 1 and len(failures) == _SAME_FAILURES:
                break
            continue
        report["probe"] = probed = result.report
        report["steps"] = _steps_report(cfg, result.grid)
        report["probed_with"] = {
            "height": size.height,
            "width": size.width,
            "num_frames": size.num_frames,
            "guidance_scale": scale,
            "steps": steps,
            "takes": [2, 3] if probed["call_mode"] != "one take a call" else [1],
        }
        report["guidance"] = rule_text(probed)
        report["layout"] = layout_text(probed)
        report["lora"] = lora_of({name: modules[name] for name in probed["denoisers"]})
        return
    raise _main_failure(failures) if failures else CannotRun(f"{type(pipe).__name__}: no size was tried")


def _steps_report(cfg: Config, grid: NoiseGrid | None) -> dict[str, Any]:
    """What the sampler does at each of its steps: noise levels, std, and the share of the gradient."""
    assert grid is not None  # the probe has succeeded
    kind, noise_level = cfg.sampler.kind, cfg.sampler.noise_level
    steps = [asdict(step) for step in noise_of_steps(grid, kind, noise_level)]
    return {"sampler": kind, "noise_level": noise_level, "steps": steps}


def _main_failure(failures: list[RushesError]) -> RushesError:
    """The most frequent reason; complaints about an unsuitable size count only where there is no other reason."""
    others = [error for error in failures if not re.search(r"divisible|multiple of|too small", str(error))]
    counts = Counter(str(error) for error in others or failures)
    return max(others or failures, key=lambda error: counts[str(error)])


def _with_alternative(
    pipe: Any, device: torch.device, cfg: Config, error: UnsupportedPolicyError
) -> UnsupportedPolicyError:
    """The refusal; says so if the same model can be trained without guidance, or without rescaled guidance."""
    generator = cfg.generator
    if "guidance" not in str(error):
        return error
    alternatives: dict[str, dict[str, Any]] = {}
    rescale = parameters_of(pipe).get("guidance_rescale")
    if rescale is not None and rescale.default and "guidance_rescale" not in generator.call_kwargs:
        alternatives["With generator.call_kwargs.guidance_rescale=0"] = {
            "call_kwargs": {**generator.call_kwargs, "guidance_rescale": 0.0}
        }
    if generator.guidance_scale != 1.0:
        alternatives["Without guidance (guidance_scale 1)"] = {"guidance_scale": 1.0}
    for description, changes in alternatives.items():
        changed = cfg.model_copy(update={"generator": generator.model_copy(update=changes)})
        try:
            probe(PolicyPipeline(changed, pipe, device))
        except RushesError:
            continue
        return UnsupportedPolicyError(f"{error}. {description} it can be trained")
    return error


def default_guidance(pipe: Any) -> float:
    """The guidance scale that the pipeline itself uses by default; 1 where it has none."""
    parameters = parameters_of(pipe)
    for name in ("guidance_scale", "true_cfg_scale"):
        value = parameters[name].default if name in parameters else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return 1.0
