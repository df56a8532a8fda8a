"""Which modules of a model are its repeated blocks: what is compiled and sharded as a unit, and gets LoRA layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch


def repeated_blocks(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Path -> block, none of them inside another; empty where a model has none.

    diffusers and transformers keep a stack of blocks in a ModuleList. A list's entries are blocks if they are of one
    class, or of a class that occurs in it at least twice (not the layers of a feed-forward network). An entry that
    contains classes which diffusers names in `_repeated_blocks` (a U-Net's resolution level) is searched instead. The
    names alone are not enough: some models have stacks of classes that are missing there.
    """
    named = set(getattr(model, "_repeated_blocks", None) or ())
    return dict(_blocks_in(model, named, ""))


def _blocks_in(module: torch.nn.Module, named: set[str], path: str) -> Iterator[tuple[str, torch.nn.Module]]:
    stacked = _stacked_classes(module)
    for name, child in module.named_children():
        if type(child) in stacked and _is_block(child, named):
            yield path + name, child
        else:
            yield from _blocks_in(child, named, f"{path}{name}.")


def _stacked_classes(module: torch.nn.Module) -> set[type]:
    """Classes of which `module`, if it is a list, is a stack."""
    if not isinstance(module, torch.nn.ModuleList):
        return set()
    counts = Counter(type(entry) for entry in module)
    return {cls for cls, count in counts.items() if count > 1 or len(counts) == 1}


def _is_block(entry: torch.nn.Module, named: set[str]) -> bool:
    if isinstance(entry, torch.nn.ModuleList) or not any(True for _ in entry.children()):
        return False  # a list of lists, or of single layers
    is_level = type(entry).__name__ not in named and any(type(part).__name__ in named for part in entry.modules())
    return not is_level and any(True for _ in entry.parameters())
