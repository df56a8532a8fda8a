"""Moves a rollout worker's modules between accelerator and main memory (`generator.offload`).

Rollouts only: the learner has no VAE and rarely text encoders, and its backward pass needs the whole denoisers.

idle    text encoders, VAE and the like are on the accelerator only while they run, the denoisers always
group   every layer, the denoisers' too, is on the accelerator only while it runs (diffusers group offloading)
"""

from __future__ import annotations

import logging
from typing import Any

import torch

log = logging.getLogger("rushes.generators")


class Offload:
    """Moves a pipeline's modules during its calls. All of them start on the CPU."""

    def __init__(self, kind: str, pipe: Any, denoisers: dict[str, torch.nn.Module], device: torch.device) -> None:
        self.kind, self.pipe, self.device = kind, pipe, device
        self._denoisers = denoisers
        self._idle: dict[str, Any] = {}
        decode_in_pieces(pipe)
        if kind == "group":
            pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")
            return
        for name, module in pipe.components.items():
            if isinstance(module, torch.nn.Module):
                self.adopt(name, module)
        for module in denoisers.values():
            module.register_forward_pre_hook(lambda _module, _args: self.clear())

    def adopt(self, name: str, module: torch.nn.Module) -> None:
        """Starts moving a component; also for one that was loaded later."""
        if self.kind == "group":
            from diffusers.hooks import apply_group_offloading

            apply_group_offloading(
                module, onload_device=self.device, offload_type="leaf_level", use_stream=self.device.type == "cuda"
            )
            return
        from accelerate import cpu_offload_with_hook

        _, hook = cpu_offload_with_hook(module, self.device)  # moves it to the device before each forward pass
        if name not in self._denoisers:
            self._idle[name] = hook

    def clear(self) -> None:
        """Sends everything but the denoisers to the CPU; called before each denoiser pass."""
        for hook in self._idle.values():
            if device_of(hook.model).type != "cpu":
                hook.offload()

    def layers_changed(self, modules: dict[str, torch.nn.Module]) -> None:
        """Call after LoRA layers have been added."""
        if self.kind == "group":
            from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

            for module in modules.values():
                _maybe_remove_and_reapply_group_offloading(module)


def device_of(module: torch.nn.Module) -> torch.device:
    """The device of a module's weights."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def decode_in_pieces(pipe: Any) -> None:
    """Decodes one take at a time, and large frames in overlapping tiles, where the VAE can."""
    vae = getattr(pipe, "vae", None)
    for name in ("enable_slicing", "enable_tiling"):
        enable = getattr(vae, name, None)
        if enable is not None:
            enable()
        elif vae is not None:
            log.info("%s has no %s: it decodes whole batches", type(vae).__name__, name)
