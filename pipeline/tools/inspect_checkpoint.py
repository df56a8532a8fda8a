"""What a checkpoint is as a policy, found by probing it: `rushes inspect`. Returns plain data.

Sizes that the caller leaves open are chosen small, from the checkpoint's own config, so that a probe is quick.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.config.schema import Config, TrainableConfig
from pipeline.core.errors import CannotRun, RushesError, UnsupportedPolicyError
from pipeline.generators.adapters import lora_targets
from pipeline.generators.call.arguments import FRAMES, parameters_of
from pipeline.generators.load.pipeline import denoisers_of, load_pipeline, resolve_device
from pipeline.generators.policy import Policy
from pipeline.generators.record.first_order import first_order_scheduler, kinds_for

RANK = 16
_LARGEST = 256  # pixels; a probe needs no more
_LARGEST_LATENT = 64  # positions a side: beyond it a VAE's attention takes gigabytes
_GUIDED_STEPS = 8  # sampler steps where a guider chooses its rule by the step
_SAME_FAILURES = 3  # sizes that fail for the same reason, after which others would too
_NOISE = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.7, "ddim": 1.0, "lcm": 1.0}

_RULE_WORDS = {
    "identity": "no guidance in the sampler: the denoiser's output as it is",
    "cfg": "classifier-free guidance, uncond + g (cond - uncond)",
    "cfg+1": "classifier-free guidance, cond + g (cond - uncond)",
    "linear": "a weighted sum of the denoiser's outputs and the sample, weights found at each step",
}


def inspect_checkpoint(
    checkpoint: str,
    *,
    revision: str | None = None,
    pipeline: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    guidance_scale: float | None = None,
    call: dict[str, Any] | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Loads and probes a checkpoint. `trainable` says whether it can be a policy, `reason` why not.

    `pipeline`: a class to load it with other than its own. Raises InputError when it cannot be loaded at all.
    """
    started = time.perf_counter()
    where = resolve_device(device)
    base = _config(checkpoint, revision, pipeline, 64, 64, 1, 1.0, call or {}, "flow_sde")
    pipe = load_pipeline(base.generator, where)
    report: dict[str, Any] = {
        "checkpoint": checkpoint,
        "pipeline": type(pipe).__name__,
        "components": components_of(pipe),
        "trainable": False,
        "reason": None,
    }
    report["memory_bytes"] = dict(_memory(report["components"]))
    try:
        _probe(pipe, where, report, base, height, width, num_frames, guidance_scale)
        report["trainable"] = True
    except RushesError as error:
        report["reason"] = str(error)
    report["seconds"] = round(time.perf_counter() - started, 2)
    return report


def _config(checkpoint, revision, pipeline, height, width, frames, scale, call, kind) -> Config:
    """A config that is only a carrier: what has no default is filled in and not used."""
    return Config.model_validate(
        {
            "generator": {
                "pretrained": checkpoint,
                "revision": revision,
                "pipeline": pipeline,
                "height": height,
                "width": width,
                "num_frames": frames,
                "guidance_scale": scale,
                "call_kwargs": call,
            },
            "prompts": {"train": "prompts.txt"},
            "rewards": {"reward": {"scorer": "unused"}},
            "sampler": {"kind": kind, "noise_level": _NOISE[kind], "steps": 3},
        }
    )


def _probe(pipe, where, report, base, height, width, num_frames, guidance_scale) -> None:
    """Fills the report. Raises RushesError where the checkpoint cannot be a policy."""
    theirs = type(pipe.scheduler).__name__ if getattr(pipe, "scheduler", None) is not None else None
    prediction = first_order_scheduler(pipe)
    modules = denoisers_of(pipe)
    kinds = kinds_for(pipe.scheduler, prediction)
    report["scheduler"] = {"checkpoint": theirs, "used": type(pipe.scheduler).__name__, "prediction": prediction}
    report["samplers"] = list(kinds)
    scale = default_guidance(pipe) if guidance_scale is None else guidance_scale
    failures: list[RushesError] = []
    for size, frames in _sizes(pipe, modules, num_frames):
        tall, wide = height or size, width or size
        own = base.generator
        cfg = _config(own.pretrained, own.revision, own.pipeline, tall, wide, frames, scale, own.call_kwargs, kinds[0])
        if getattr(pipe, "guider", None) is not None:
            cfg = cfg.model_copy(update={"sampler": cfg.sampler.model_copy(update={"steps": _GUIDED_STEPS})})
        try:
            found = Policy(cfg, pipe, where).probe()
        except RushesError as error:
            if isinstance(error, UnsupportedPolicyError) and not isinstance(error, CannotRun):
                raise _with_a_way_out(pipe, where, cfg, error) from error
            # It does not run, or gives no pictures: at a larger size or with a longer clip it may.
            failures.append(error)
            if len({str(e) for e in failures}) == 1 and len(failures) == _SAME_FAILURES:
                break
            continue
        report["probe"] = found
        report["probed_with"] = {
            "height": tall,
            "width": wide,
            "num_frames": frames,
            "guidance_scale": scale,
            "steps": 3,
            "takes": [2, 3] if found["call_mode"] != "one take a call" else [1],
        }
        report["guidance"] = rule_words(found)
        report["layout"] = layout_words(found)
        report["lora"] = lora_of({name: modules[name] for name in found["denoisers"]})
        return
    raise _telling(failures) if failures else CannotRun(f"{type(pipe).__name__}: no size was tried")


def _telling(failures: list[RushesError]) -> RushesError:
    """Of what failed at each size: the reason met most often, and not that a size does not suit the pipeline, where
    there is another."""
    others = [error for error in failures if not re.search(r"divisible|multiple of|too small", str(error))]
    number = Counter(str(error) for error in others or failures)
    return max(others or failures, key=lambda error: number[str(error)])


def _with_a_way_out(pipe, where, cfg: Config, error: UnsupportedPolicyError) -> UnsupportedPolicyError:
    """The refusal, with a way out where the same model can be trained without guidance, or without its rescaling."""
    generator = cfg.generator
    if "guidance" not in str(error):
        return error
    ways: dict[str, dict[str, Any]] = {}
    rescale = parameters_of(pipe).get("guidance_rescale")
    if rescale is not None and rescale.default and "guidance_rescale" not in generator.call_kwargs:
        ways["With generator.call_kwargs.guidance_rescale=0"] = {
            "call": {**generator.call_kwargs, "guidance_rescale": 0.0}
        }
    if generator.guidance_scale != 1.0:
        ways["Without guidance (guidance_scale 1)"] = {"guidance_scale": 1.0}
    for words, changed in ways.items():
        other = cfg.model_copy(update={"generator": generator.model_copy(update=changed)})
        try:
            Policy(other, pipe, where).probe()
        except RushesError:
            continue
        return UnsupportedPolicyError(f"{error}. {words} it can be trained")
    return error


def default_guidance(pipe: Any) -> float:
    """The scale that the pipeline itself would use; 1 where it has none."""
    parameters = parameters_of(pipe)
    for name in ("guidance_scale", "true_cfg_scale"):
        value = parameters[name].default if name in parameters else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return 1.0


def _first(values: Iterator[Any]) -> Any:
    return next((value for value in values if value), None)


def _sizes(pipe: Any, modules: dict[str, torch.nn.Module], num_frames: int | None) -> Iterator[tuple[int, int]]:
    """(pixels a side, frames) to try, the likeliest first."""
    configs = [module.config for module in modules.values()]
    scale = _first(getattr(pipe, name, None) for name in ("vae_scale_factor_spatial", "vae_scale_factor"))
    for name in ("vae_spatial_compression_ratio", "movq_scale_factor"):
        scale = scale or getattr(pipe, name, None)
    scale = int(scale) if isinstance(scale, (int, float)) else 8
    if not any("vae" in name or "movq" in name or "vqgan" in name for name in pipe.components):
        scale = 1  # the denoiser paints pixels
    sample = _first(c.get(key) for c in configs for key in ("sample_size", "sample_height", "input_size"))
    sample = max(sample) if isinstance(sample, (list, tuple)) else sample
    own = int(sample) * scale if isinstance(sample, int) else 0
    small = max(16, 8 * scale)
    sides = [own] if 16 <= own <= _LARGEST else []
    sides += [small, 32, 64, 128, _LARGEST, own, 512]
    ratio = _first(
        getattr(pipe, name, None)
        for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "temporal_vae_scale_factor")
    )
    lengths: list[int] = [1]
    if any(name in parameters_of(pipe) for name in (*FRAMES, "video")):
        own_frames = [c.get(key) for c in configs for key in ("video_length", "sample_frames", "num_frames")]
        default = next((parameters_of(pipe)[n].default for n in FRAMES if n in parameters_of(pipe)), None)
        step = int(ratio) if isinstance(ratio, (int, float)) and ratio > 1 else 0
        lengths = [n for n in own_frames if isinstance(n, int) and n <= 17]
        lengths += [2 * step + 1, 4 * step + 1] if step else [4, 8]
        lengths += [default] if isinstance(default, int) and default <= 33 else []
    lengths = [num_frames] if num_frames else list(dict.fromkeys(lengths))
    sides = [side for side in dict.fromkeys(sides) if 8 <= side <= min(1024, _LARGEST_LATENT * scale)]
    order = [(sides[0], length) for length in lengths[:2]] if sides else []
    order += [(side, lengths[0]) for side in sides[:5]]
    order += [(side, length) for length in lengths[1:] for side in sides[:3]]
    order += [(side, lengths[0]) for side in sides[5:]]
    yield from dict.fromkeys(order)


# -- the report's parts -----------------------------------------------------------------------------------------------


def components_of(pipe: Any) -> list[dict[str, Any]]:
    """Every component with its class; modules with parameters, bytes and dtype."""
    found = []
    for name, component in pipe.components.items():
        if component is None:
            continue
        entry: dict[str, Any] = {"name": name, "class": type(component).__name__}
        if isinstance(component, torch.nn.Module):
            parameters = list(component.parameters())
            dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in parameters)
            entry["parameters"] = sum(p.numel() for p in parameters)
            entry["bytes"] = sum(p.numel() * p.element_size() for p in parameters)
            entry["dtype"] = dtypes.most_common(1)[0][0] if dtypes else None
        found.append(entry)
    return found


def _memory(components: list[dict[str, Any]]) -> Counter[str]:
    """Bytes of weights per dtype."""
    total: Counter[str] = Counter()
    for entry in components:
        if entry.get("dtype"):
            total[entry["dtype"]] += entry["bytes"]
    return total


def rule_words(found: dict[str, Any]) -> str:
    """The guidance rule in plain words."""
    rule = found["guidance_rule"]
    if rule.startswith("linear"):
        words = _RULE_WORDS["linear"]
    elif rule.startswith("identity"):
        words = _RULE_WORDS["identity"]
    else:
        words = _RULE_WORDS["cfg+1" if "g+1" in rule else "cfg"] + f" with g = {found['guidance_scale']:g}"
        calls = found["denoiser_calls_per_step"]
        words += ", from one doubled batch" if calls == 1 else f", from {calls} calls"
        if "token norm cap" in rule:
            words += "; each token's norm is capped by the conditional output's"
        elif "token norm" in rule:
            words += "; each token keeps the conditional output's norm"
        elif "sample std" in rule:
            words += "; each take keeps the conditional output's standard deviation"
        elif "norm cap" in rule:
            words += "; each take's norm is capped by the conditional output's"
    return words + ("; the scheduler is given the negated value" if "negated" in rule else "")


def layout_words(found: dict[str, Any]) -> list[str]:
    """Batch layout in plain words."""
    words = [f"called with {found['call_mode']}"]
    if found["conditions"]:
        words.append(f"conditions given: {', '.join(found['conditions'])}")
    cut = found["output_slice"]
    if cut == "gather":
        words.append("the scheduler sees the denoiser's output unpacked or sliced (traced value by value)")
    elif cut not in ("whole", "reshaped"):
        words.append(f"of the denoiser's output the scheduler sees the {cut}")
    if found["takes_note"]:
        words.append(
            f"takes are replayed together, since they cannot be told apart in the inputs: {found['takes_note']}"
        )
    doubled = sum(1 for _, copies, order in found["takes_axis"].values() if copies > 1 and order == "tile")
    folded = sum(1 for _, copies, order in found["takes_axis"].values() if copies > 1 and order == "repeat")
    if doubled:
        words.append(f"{doubled} inputs hold the batch once per guidance branch")
    if folded:
        words.append(f"{folded} inputs hold frames folded into the batch")
    if found["alike_outputs"]:
        words.append(
            "prompt and negative prompt give nearly the same output (weights that were never trained?), so the "
            "guidance rule was found with made-up outputs"
        )
    if found["chosen_share"] < 1.0:
        words.append(
            f"the policy chooses {found['chosen_share']:.0%} of the latent values; the pipeline puts the rest back"
        )
    return words


def lora_of(modules: dict[str, torch.nn.Module]) -> dict[str, Any]:
    """What `trainable.targets: auto` would train at rank 16. Raises ConfigError where there is nothing."""
    layers: Counter[str] = Counter()
    parameters = 0
    for name, module in modules.items():
        targets = lora_targets(module, TrainableConfig().targets)
        layers[name] = len(targets)
        for target in targets:
            layer = module.get_submodule(target)
            parameters += RANK * (layer.in_features + layer.out_features)
    if not parameters:
        raise UnsupportedPolicyError("no linear layer inside the denoiser's blocks: use trainable.kind full")
    full = sum(p.numel() for module in modules.values() for p in module.parameters())
    return {"rank": RANK, "layers": dict(layers), "parameters": parameters, "full_parameters": full}
