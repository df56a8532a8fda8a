"""A model's repeated blocks: one answer for compilation, sharding and LoRA, on diffusers' real classes."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import tiny
import torch
import torch.distributed.fsdp as fsdp

from pipeline.generators import adapters
from pipeline.generators.load import compiling
from pipeline.generators.load.blocks import repeated_blocks
from pipeline.generators.load.pipeline import denoisers_of, load_denoisers
from pipeline.learner.distributed import DistributedContext

# family -> the classes of its denoiser's blocks
BLOCKS = {
    "StableDiffusion": {"BasicTransformerBlock", "ResnetBlock2D", "Downsample2D", "Upsample2D"},  # a U-Net
    "PixArtAlpha": {"BasicTransformerBlock"},  # diffusers names none
    "Flux": {"FluxTransformerBlock", "FluxSingleTransformerBlock"},
    "HunyuanVideoImageToVideo": {  # its main blocks are missing in diffusers' names
        "HunyuanVideoTokenReplaceTransformerBlock",
        "HunyuanVideoTokenReplaceSingleTransformerBlock",
        "HunyuanVideoIndividualTokenRefinerBlock",
    },
    "LTX": {"LTXVideoTransformerBlock"},
}


def compiled_in(model: torch.nn.Module, monkeypatch) -> list[torch.nn.Module]:
    blocks: list[torch.nn.Module] = []
    monkeypatch.setattr(compiling, "cannot_compile", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: blocks.append(self))
    assert compiling.compile_blocks({"denoiser": model}, torch.device("cpu")) == len(blocks)
    return blocks


def sharded_in(model: torch.nn.Module, monkeypatch) -> list[torch.nn.Module]:
    """The blocks, without the model itself, which is sharded last."""
    modules: list[torch.nn.Module] = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **options: modules.append(module))
    DistributedContext(mesh=object()).shard({"denoiser": model})
    assert modules.pop() is model
    return modules


@pytest.mark.parametrize("name", list(BLOCKS))
def test_compilation_sharding_and_lora_use_the_same_blocks(name, monkeypatch):
    for denoiser in denoisers_of(families.FAMILIES[name].build()).values():
        blocks = repeated_blocks(denoiser)
        assert {type(block).__name__ for block in blocks.values()} == BLOCKS[name]
        assert compiled_in(denoiser, monkeypatch) == sharded_in(denoiser, monkeypatch) == list(blocks.values())
        linear = [
            f"{path}.{name}"
            for path, block in blocks.items()
            for name, layer in block.named_modules()
            if isinstance(layer, torch.nn.Linear)
        ]
        assert sorted(adapters.lora_targets(denoiser, "auto")) == sorted(linear)


def test_blocks_with_diffusers_names_and_without(tiny_sd3, tiny_wan):
    for folder, cls, named in ((tiny_sd3, "JointTransformerBlock", False), (tiny_wan, "WanTransformerBlock", True)):
        denoiser = load_denoisers(tiny.config(folder).generator, torch.device("cpu"), torch.float32)["transformer"]
        assert bool(denoiser._repeated_blocks) == named
        blocks = repeated_blocks(denoiser)
        assert [type(block).__name__ for block in blocks.values()] == [cls] * denoiser.config.num_layers
    assert repeated_blocks(torch.nn.Linear(2, 2)) == {}


@pytest.mark.parametrize(("folder", "prefix"), [("shapes-image", "transformer_blocks"), ("shapes-video", "blocks")])
def test_blocks_of_the_shipped_generators(folder, prefix):
    """Every linear layer below a numbered path gets a LoRA, and nothing else."""
    generator = tiny.config(Path(__file__).parents[2] / "models" / folder).generator
    denoiser = load_denoisers(generator, torch.device("cpu"), torch.float32)["transformer"]
    assert list(repeated_blocks(denoiser)) == [f"{prefix}.{i}" for i in range(denoiser.config.num_layers)]
    numbered = [
        name
        for name, layer in denoiser.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.startswith(f"{prefix}.")
    ]
    assert adapters.lora_targets(denoiser, "auto") == numbered
