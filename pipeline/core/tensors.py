"""Tensors as numpy arrays for the object store, and checksums over them.

Ray shares numpy arrays between processes without copying (pickle protocol 5, out of band); torch tensors would be
pickled through their storage. bfloat16 has no numpy dtype, so it travels as its bits with a tag.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

_BITS = {"bfloat16": torch.int16, "float8_e4m3fn": torch.uint8, "float8_e5m2": torch.uint8}


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor of any shape as a numpy array (`bits` for dtypes that numpy lacks) and its torch dtype's name."""

    data: np.ndarray
    dtype: str


@dataclass(frozen=True, slots=True)
class SharedSlot:
    """Stands for entry `index` of `Trajectory.shared` inside a recorded call's inputs."""

    index: int


@dataclass(frozen=True, slots=True)
class SampleCopies:
    """Stands for the step's own sample inside a recorded call's inputs: the very tensor, or `copies` of it
    concatenated along axis 0 (a doubled guidance batch)."""

    copies: int


@dataclass(frozen=True, slots=True)
class CallOutput:
    """Stands for an output of a call that was made before the recorded one, and recorded with it (a ControlNet's
    residual)."""

    call: int  # position among the calls before
    path: str  # of the leaf in its output


def pack(tensor: torch.Tensor) -> PackedTensor:
    """Copies a tensor (any device) into a packed array."""
    name = str(tensor.dtype).removeprefix("torch.")
    host = tensor.detach().to("cpu").contiguous()
    if name in _BITS:
        host = host.view(_BITS[name])
    return PackedTensor(np.array(host.numpy(), copy=True), name)


def unpack(packed: PackedTensor, device: str | torch.device = "cpu") -> torch.Tensor:
    """The tensor back, as a writable copy on `device`."""
    host = torch.from_numpy(np.array(packed.data, copy=True))
    if packed.dtype in _BITS:
        host = host.view(getattr(torch, packed.dtype))
    return host.to(device)


def map_leaves(fn: Callable[[str, Any], Any], tree: Any, path: str = "") -> Any:
    """Rebuilds a tree of dicts, lists and tuples with every leaf replaced by `fn(path, leaf)`."""
    if isinstance(tree, dict):
        return {key: map_leaves(fn, value, f"{path}.{key}" if path else str(key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [map_leaves(fn, value, f"{path}[{i}]") for i, value in enumerate(tree)]
        if isinstance(tree, list):
            return items
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return fn(path, tree)


def checksum(tensors: Mapping[str, PackedTensor]) -> str:
    """Digest over names, dtypes, shapes and bytes, in name order: two holders of equal weights agree on it.

    It guards against mistakes, not against an attacker, and lies on the way of every version: xxh3 reads memory at its
    speed (blake2b, 22 times slower, was most of a weight update).
    """
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        packed = tensors[name]
        digest.update(f"{name}|{packed.dtype}|{packed.data.shape}|".encode())
        digest.update(np.ascontiguousarray(packed.data).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays and tensors in a tree."""
    total = 0

    def count(_: str, leaf: Any) -> Any:
        nonlocal total
        if isinstance(leaf, PackedTensor):
            total += leaf.data.nbytes
        elif isinstance(leaf, (np.ndarray, torch.Tensor)):
            total += leaf.nbytes
        return leaf

    map_leaves(count, tree)
    return total
