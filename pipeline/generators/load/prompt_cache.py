"""Caches a pipeline's `encode_prompt`, so that a prompt is encoded once and not once per group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipeline.core.tensors import map_leaves, tree_bytes

_MAX_BYTES = 256 * 2**20  # of embeddings, on the device: those of one group of a large model are tens of MB


class PromptCache:
    """Stands in for `pipe.encode_prompt`. Keeps the results for the most recently used arguments."""

    def __init__(self, encode: Callable[..., Any], max_bytes: int = _MAX_BYTES) -> None:
        self._encode, self._max_bytes = encode, max_bytes
        self._results: dict[str, tuple[Any, int]] = {}  # result and its bytes, the most recently used last
        self._bytes = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result, as a copy. Calls with pictures or tensors among their arguments are not cached."""
        if not _is_plain(args) or not _is_plain(kwargs):
            return self._encode(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        if key in self._results:
            result, size = self._results.pop(key)
        else:
            result = self._encode(*args, **kwargs)
            size = tree_bytes(result)
            self._bytes += size
        self._results[key] = result, size
        while self._bytes > self._max_bytes:
            self._bytes -= self._results.pop(next(iter(self._results)))[1]
        return map_leaves(lambda _, leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, result)

    def clear(self) -> None:
        self._results.clear()
        self._bytes = 0


def cache_prompts(pipe: Any, max_bytes: int = _MAX_BYTES) -> None:
    """Puts a cache in front of `encode_prompt`, where the pipeline has one and it is not cached yet."""
    encode = getattr(pipe, "encode_prompt", None)
    if encode is not None and not isinstance(encode, PromptCache):
        pipe.encode_prompt = PromptCache(encode, max_bytes)


def forget_prompts(pipe: Any) -> None:
    """Empties the cache of `cache_prompts`: the text encoders have changed."""
    encode = getattr(pipe, "encode_prompt", None)
    if isinstance(encode, PromptCache):
        encode.clear()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(entry) for entry in value)
    if isinstance(value, dict):
        return all(_is_plain(entry) for entry in value.values())
    return isinstance(value, (str, int, float, bool, type(None), torch.dtype, torch.device))
