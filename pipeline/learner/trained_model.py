"""What a learner loads: the denoisers, what of them is trained, and a frozen copy for other policies."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from pipeline.config.schema import Config
from pipeline.core.devices import resolve_dtype
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.generators import adapters
from pipeline.generators.checkpoint_files import CONTROLNET, DENOISERS
from pipeline.generators.load.compiling import compile_blocks
from pipeline.generators.load.pipeline import load_denoisers, load_pipeline, replayed_modules, trained_modules
from pipeline.generators.replay.text_inputs import TextReencoder
from pipeline.learner.distributed import DistributedContext
from pipeline.rl.objectives import objective_of

Modules = dict[str, torch.nn.Module]


@dataclass(frozen=True, slots=True)
class TrainedModel:
    modules: Modules  # the denoisers, and the ControlNets that feed them
    trained: Modules  # what has trainable weights: the denoisers, ControlNets, text encoders, or denoisers and encoders
    frozen: Modules | None  # copies of the denoisers for the passes of other policies, for full weights
    text: TextReencoder | None  # where text encoders are trained
    rollout_dtype: torch.dtype  # of the weights that rollout workers get


def load_trained_model(cfg: Config, device: torch.device, distributed: DistributedContext) -> TrainedModel:
    """Loads the checkpoint, adds the adapters, compiles, and shards over the learner's ranks."""
    sampling_dtype = resolve_dtype(cfg.generator.dtype, device.type)
    full = cfg.trainable.kind == "full"
    # Full weights are trained in float32; under a LoRA the frozen base may stay in the sampling dtype.
    base_dtype = torch.float32 if full or cfg.learner.autocast != "none" else sampling_dtype
    if cfg.generator.quantize != "none":
        base_dtype = sampling_dtype  # quantised from the same weights as the rollouts'
    text: TextReencoder | None = None
    if not cfg.trainable.trains_text:
        # Shards go to the device block by block: the whole model need not fit there.
        load_to = device if distributed.world == 1 else torch.device("cpu")
        modules = load_denoisers(cfg.generator, load_to, base_dtype)
        controlnet = cfg.trainable.modules == "controlnet"
        trained = {name: module for name, module in modules.items() if name.startswith(CONTROLNET) == controlnet}
        if not trained:
            raise UnsupportedPolicyError(
                f"trainable.modules: controlnet needs one, and {cfg.generator.pretrained} has none; use denoiser"
            )
    else:
        pipe = load_pipeline(cfg.generator, device)
        modules = replayed_modules(pipe)
        if base_dtype != sampling_dtype:
            for module in modules.values():
                module.to(base_dtype)
        trained = trained_modules(pipe, cfg.trainable)
        text = TextReencoder(pipe, cfg.generator)
    needs = objective_of(cfg).requirements
    frozen = copy.deepcopy(modules) if full and (needs.reference_every or needs.old_policy) else None
    adapters.add_adapters(trained, cfg.trainable, cfg.run.seed)
    if cfg.learner.activation_checkpointing:
        for module in modules.values():
            module.enable_gradient_checkpointing()  # type: ignore[operator]
            module.train()  # diffusers recomputes activations in train mode only
            _disable_dropout(module)
    for copies in (modules, frozen or {}):
        if cfg.generator.compile:
            compile_blocks(only_denoisers(copies), device)
    for copies in (modules, frozen or {}):
        distributed.split_context(copies)
        distributed.shard(copies)
    return TrainedModel(modules, trained, frozen, text, sampling_dtype if full else torch.float32)


def only_denoisers(modules: Modules) -> Modules:
    """Those that are compiled: ControlNets are small beside them."""
    return {name: module for name, module in modules.items() if name in DENOISERS}


def _disable_dropout(module: torch.nn.Module) -> None:
    """Train mode without dropout: the replayed policy must be the one that sampled."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.dropout._DropoutNd):
            layer.eval()
