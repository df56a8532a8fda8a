"""Attention processors that a pipeline puts into its denoiser while it samples (perturbed-attention guidance).

They go with the recorded call by class name, and replay puts them in place before it makes the call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models import attention_processor

from pipeline.core.errors import UnsupportedPolicyError

_OWN: WeakKeyDictionary[torch.nn.Module, dict[str, Any]] = WeakKeyDictionary()  # what `apply_processors` has replaced


def processors_of(module: torch.nn.Module) -> dict[str, Any]:
    """Path of each attention layer -> its processor."""
    return {
        path: layer.processor
        for path, layer in module.named_modules()
        if hasattr(layer, "processor") and hasattr(layer, "set_processor")
    }


def changed(module: torch.nn.Module, own: dict[str, Any]) -> dict[str, str]:
    """Path -> class name, where a processor is of another class than in `own`.

    Raises UnsupportedPolicyError where it has settings, or is not one of diffusers' own.
    """
    found = {}
    for path, processor in processors_of(module).items():
        kind = type(processor)
        if path not in own or kind is type(own[path]):
            continue
        if getattr(attention_processor, kind.__name__, None) is not kind or vars(processor):
            raise UnsupportedPolicyError(
                f"attention processor {kind.__name__}, put in place while sampling, cannot be recorded and replayed"
            )
        found[path] = kind.__name__
    return found


def restore_processors(module: torch.nn.Module, own: dict[str, Any]) -> None:
    """Processors as they were."""
    for path, processor in own.items():
        layer = module.get_submodule(path)
        if layer.processor is not processor:
            layer.set_processor(processor)


def apply_processors(module: torch.nn.Module, names: dict[str, str]) -> None:
    """Gives `module` the processors of a recorded call; none of another call stay behind.

    They stay until the next call, since activation checkpointing runs a layer again in the backward pass.
    """
    if module in _OWN:
        restore_processors(module, _OWN.pop(module))
    if not names:
        return
    own = processors_of(module)
    _OWN[module] = {path: own[path] for path in names}
    for path, name in names.items():
        module.get_submodule(path).set_processor(getattr(attention_processor, name)())


def reset_processors(modules: Iterable[torch.nn.Module]) -> None:
    """Ends what `apply_processors` began."""
    for module in modules:
        apply_processors(module, {})
