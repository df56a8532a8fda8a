"""Loads diffusers checkpoints: whole pipelines for rollouts, bare denoisers for the learner. Safetensors only."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from pipeline.config import GeneratorConfig
from pipeline.errors import InputError, UnsupportedPolicyError

DENOISERS = ("transformer", "transformer_2", "unet")


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on the CPU, where bfloat16 is slower."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def _explain(cfg: GeneratorConfig, error: Exception) -> InputError:
    where = "folder" if Path(cfg.pretrained).is_dir() else "hub id"
    cause = " ".join(str(error).split())[:400]
    return InputError(
        f"generator.pretrained: the {where} {cfg.pretrained!r} could not be loaded as a diffusers pipeline "
        f"({type(error).__name__}: {cause}); it needs model_index.json and safetensors weights of every component"
    )


def load_pipeline(cfg: GeneratorConfig, device: torch.device) -> DiffusionPipeline:
    """The checkpoint's own pipeline class, in evaluation mode, on `device`.

    Raises InputError naming the checkpoint. Weights must be safetensors; remote code is never run.
    """
    try:
        pipe = DiffusionPipeline.from_pretrained(
            cfg.pretrained,
            revision=cfg.revision,
            dtype=resolve_dtype(cfg.dtype, device),
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        raise _explain(cfg, error) from error
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoisers_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The modules the sampler steps call, by component name. Raises UnsupportedPolicyError if there is none."""
    found = {name: pipe.components[name] for name in DENOISERS if pipe.components.get(name) is not None}
    if not found:
        raise UnsupportedPolicyError(
            f"{type(pipe).__name__} has none of the components {', '.join(DENOISERS)}; there is nothing to train"
        )
    return found


def load_denoisers(cfg: GeneratorConfig, device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Only the denoisers of a checkpoint: the learner needs neither text encoders nor VAE."""
    try:
        index = DiffusionPipeline.load_config(cfg.pretrained, revision=cfg.revision)
        modules = {}
        for name in DENOISERS:
            library, cls = index.get(name) or (None, None)
            if library is None or cls is None:
                continue
            factory: Any = getattr(importlib.import_module(library), cls)
            modules[name] = factory.from_pretrained(
                cfg.pretrained, subfolder=name, revision=cfg.revision, dtype=dtype, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
        raise _explain(cfg, error) from error
    if not modules:
        raise UnsupportedPolicyError(f"{cfg.pretrained}: no {' / '.join(DENOISERS)} in model_index.json")
    for module in modules.values():
        module.eval().requires_grad_(False).to(device)
    return modules


def prediction_of(scheduler: Any) -> str:
    """What the denoiser predicts: flow | epsilon | v_prediction | sample."""
    kind = scheduler.config.get("prediction_type")
    if "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas") or kind == "flow_prediction":
        return "flow"
    if kind in ("epsilon", "v_prediction", "sample") and hasattr(scheduler, "alphas_cumprod"):
        return kind
    raise UnsupportedPolicyError(
        f"scheduler {type(scheduler).__name__} (prediction_type {kind!r}) is neither a flow scheduler nor one with "
        "alphas_cumprod; swap it for FlowMatchEulerDiscreteScheduler or DDIMScheduler in the checkpoint"
    )


def first_order_scheduler(pipe: DiffusionPipeline) -> str:
    """Puts the matching first-order grid in place where the checkpoint's scheduler has another; returns prediction.

    Flow schedulers of order 1 keep their own sigmas (their `step` is replaced anyway). Diffusion models get DDIM,
    whose latents are not rescaled by sigma as in the Euler and LMS families.
    """
    scheduler = pipe.scheduler
    prediction = prediction_of(scheduler)
    if prediction == "flow":
        if getattr(scheduler, "order", 1) != 1:
            raise UnsupportedPolicyError(
                f"scheduler {type(scheduler).__name__} takes {scheduler.order} model calls per step; "
                "use FlowMatchEulerDiscreteScheduler"
            )
    elif not isinstance(scheduler, DDIMScheduler):
        pipe.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    return prediction


def accepted(call: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `kwargs` that the callable takes."""
    parameters = inspect.signature(call).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}
