"""Attention processors that a pipeline installs in its denoiser while it samples (perturbed-attention guidance).

They are recorded with each denoiser call by class name; replay installs them before it makes the call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models import attention_processor

from pipeline.core.errors import UnsupportedPolicyError

# What `apply_processors` has replaced, by attention layer.
_REPLACED: WeakKeyDictionary[torch.nn.Module, dict[str, Any]] = WeakKeyDictionary()


def processors_of(module: torch.nn.Module) -> dict[str, Any]:
    """Path of each attention layer -> its processor."""
    return {
        path: layer.processor
        for path, layer in module.named_modules()
        if hasattr(layer, "processor") and hasattr(layer, "set_processor")
    }


def changed_processors(module: torch.nn.Module, before: dict[str, Any]) -> dict[str, str]:
    """Path -> class name, where a processor is of another class than in `before`.

    Raises UnsupportedPolicyError where it has settings, or is not one of diffusers' own.
    """
    changed = {}
    for path, processor in processors_of(module).items():
        cls = type(processor)
        if path not in before or cls is type(before[path]):
            continue
        if getattr(attention_processor, cls.__name__, None) is not cls or vars(processor):
            raise UnsupportedPolicyError(
                f"attention processor {cls.__name__}, installed while sampling, cannot be recorded and replayed"
            )
        changed[path] = cls.__name__
    return changed


def restore_processors(module: torch.nn.Module, processors: dict[str, Any]) -> None:
    """Installs these processors again where others have replaced them."""
    for path, processor in processors.items():
        layer: Any = module.get_submodule(path)
        if layer.processor is not processor:
            layer.set_processor(processor)


def apply_processors(module: torch.nn.Module, class_names: dict[str, str]) -> None:
    """Installs the processors of a recorded call, and removes those of any call before it.

    They stay until the next call, since activation checkpointing runs a layer again in the backward pass.
    """
    if module in _REPLACED:
        restore_processors(module, _REPLACED.pop(module))
    if not class_names:
        return
    before = processors_of(module)
    _REPLACED[module] = {path: before[path] for path in class_names}
    for path, name in class_names.items():
        layer: Any = module.get_submodule(path)
        layer.set_processor(getattr(attention_processor, name)())


def reset_processors(modules: Iterable[torch.nn.Module]) -> None:
    """Removes what `apply_processors` installed."""
    for module in modules:
        apply_processors(module, {})
