"""The trained weights of a model: LoRA layers or all weights, packed for the object store and applied with a checksum.

LoRA layers are PEFT's; their reference policy is the model with the adapter off. Full weights keep a frozen copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from pipeline.config.schema import TrainableConfig
from pipeline.core.errors import ConfigError, RushesError
from pipeline.core.tensors import PackedTensor, checksum, pack, unpack
from pipeline.core.types import WeightSet
from pipeline.generators.load.blocks import repeated_blocks

ADAPTER = "default"
Modules = dict[str, torch.nn.Module]


def lora_targets(module: torch.nn.Module, targets: list[str] | Literal["auto"]) -> list[str]:
    """Names of the layers that get a LoRA; auto: every linear layer inside the module's repeated blocks."""
    linear = _linear_layers(module)
    if targets == "auto":
        blocks = tuple(f"{path}." for path in repeated_blocks(module))
        return [name for name in linear if name.startswith(blocks) and not _called_by_keyword(module, name)]
    return [name for name in linear if any(_matches(name, target) for target in targets)]


def _linear_layers(module: torch.nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def check_targets(modules: Modules, targets: list[str] | Literal["auto"]) -> None:
    """Raises ConfigError when a target matches no layer of any module."""
    linear = [name for module in modules.values() for name in _linear_layers(module)]
    for target in targets if targets != "auto" else []:
        if not any(_matches(name, target) for name in linear):
            last_names = {name.rsplit(".", 1)[-1] for name in linear}
            available = ", ".join(sorted(name for name in last_names if not name.isdigit()))
            classes = ", ".join(dict.fromkeys(type(module).__name__ for module in modules.values()))
            raise ConfigError(
                f"trainable.targets: no linear layer of {classes} is called {target!r}; known: {available}"
            )


def _called_by_keyword(module: torch.nn.Module, name: str) -> bool:
    """Whether the layer is called as `proj_in(input=...)`, which PEFT cannot wrap (temporal transformers)."""
    parent, _, child = name.rpartition(".")
    cls = type(module.get_submodule(parent)).__name__
    return child in ("proj_in", "proj_out") and cls in ("AnimateDiffTransformer3D", "TransformerTemporalModel")


def add_adapters(modules: Modules, cfg: TrainableConfig, seed: int) -> None:
    """Makes the modules trainable as configured. LoRA A is drawn from `seed`, B is 0: the policy starts unchanged.

    Raises ConfigError where there is nothing to train.
    """
    if cfg.kind == "full":
        for module in modules.values():
            module.requires_grad_(True)
        return
    check_targets(modules, cfg.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in modules.values():
            targets = lora_targets(module, cfg.targets)
            if not targets and cfg.targets != "auto" and len(modules) > 1:
                continue  # names that only the other modules have
            if not targets:
                raise ConfigError(f"trainable.targets: {type(module).__name__} has no linear layer inside its blocks")
            config = LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=targets)
            inject_adapter_in_model(config, module, ADAPTER)  # also for models without diffusers' PEFT mixin
            _mark_as_peft(module, {ADAPTER: config})
    for parameter in trainable(modules).values():
        parameter.data = parameter.data.float()  # float32 master weights whatever the base's dtype


def _mark_as_peft(module: Any, configs: dict[str, LoraConfig] | None) -> None:
    """Sets what diffusers' adapter methods look at."""
    if configs is None:
        module.__dict__.pop("peft_config", None)
    else:
        module.peft_config = configs
    module._hf_peft_config_loaded = configs is not None


def trainable(modules: Modules) -> dict[str, torch.nn.Parameter]:
    """`<component>.<parameter>` -> parameter, in name order."""
    parameters = {
        f"{component}.{name}": parameter
        for component, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    return dict(sorted(parameters.items()))


@contextmanager
def adapters_off(modules: Modules) -> Iterator[None]:
    """The base model: LoRA disabled within the block."""
    layers = [layer for module in modules.values() for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def to_weight_set(kind: Literal["lora", "full"], tensors: dict[str, torch.Tensor]) -> WeightSet:
    """Packs named tensors for the object store."""
    packed = {name: pack(tensor) for name, tensor in tensors.items()}
    return WeightSet(kind=kind, tensors=packed, checksum=checksum(packed))


def apply(modules: Modules, weights: WeightSet) -> str:
    """Copies a weight set into the trainable parameters; returns the checksum of their new values.

    Raises RushesError when names or shapes do not match.
    """
    parameters = trainable(modules)
    if parameters.keys() != weights.tensors.keys():
        unmatched = sorted(parameters.keys() ^ weights.tensors.keys())
        raise RushesError(
            f"weights do not fit this model: {len(unmatched)} names differ, such as {unmatched[0]}; "
            "are generator.pretrained and trainable the same?"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = unpack(weights.tensors[name])
            if value.shape != parameter.shape:
                raise RushesError(
                    f"weights do not fit: {name} is {list(value.shape)}, expected {list(parameter.shape)}"
                )
            parameter.copy_(value)
    applied: dict[str, PackedTensor] = {name: pack(parameter) for name, parameter in parameters.items()}
    return checksum(applied)


def merge_and_unload(modules: Modules) -> None:
    """Merges the LoRA into the weights and removes its layers: plain modules remain."""
    for module in modules.values():
        for name, layer in list(module.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                parent, _, child = name.rpartition(".")
                setattr(module.get_submodule(parent), child, layer.get_base_layer())
        _mark_as_peft(module, None)


class MergedLora:
    """Runs a LoRA model with the adapter merged into the base weights: no adapter arithmetic in the forward pass.

    Every merge starts from a copy of the base weights, so that repeated merges do not drift.
    """

    def __init__(self, modules: Modules) -> None:
        self.layers = [
            layer for module in modules.values() for layer in module.modules() if isinstance(layer, LoraLayer)
        ]
        self.base = [layer.get_base_layer().weight.detach().clone() for layer in self.layers]
        for module in modules.values():
            for layer in module.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.enable_adapters(False)
        for layer in self.layers:  # disabling also froze them, but they are still received and checked
            for parameter in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight):
                parameter.requires_grad_(True)

    @torch.no_grad()
    def merge(self) -> None:
        """Base plus the adapter's current delta."""
        for layer, base in zip(self.layers, self.base, strict=True):
            layer.get_base_layer().weight.copy_(base + layer.get_delta_weight(ADAPTER).to(base.dtype))
