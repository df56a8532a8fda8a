"""Caches prompt embeddings on disk, so that a later run need not load the text encoders at all.

    <generator.embedding_cache>/<model>/model.json            what may be left out when loading, or why nothing
    <generator.embedding_cache>/<model>/<call>.safetensors    what `encode_prompt` gave for one call

`<model>` is a digest of the text encoders' and tokenizers' files (or hub id and commit), the pipeline class and the
dtype; `<call>` one of the arguments of `encode_prompt`, texts and pictures included. Only the pipeline's
`encode_prompt` is replaced: it reads the cache first. A call that is not cached loads the text encoders.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import GeneratorConfig
from pipeline.core.devices import resolve_dtype
from pipeline.core.errors import InputError
from pipeline.core.files import atomic_write, describe_os_error
from pipeline.core.reading import parse_json, read_json_object
from pipeline.generators.call.arguments import CallMode
from pipeline.generators.load.pipeline import load_component, model_index

log = logging.getLogger("rushes.generators")

_FORMAT = 2
_SAMPLES, _CHUNK = 32, 1 << 16  # places and bytes per place that are hashed of a large weight file
_WHOLE = 1 << 22  # files up to this size are read whole
_LANGUAGE = ("text_encoder", "tokenizer", "processor")  # prefixes of component names that an embedding depends on


class _NotStorable(Exception):
    """A value that has no digest of its content, or that cannot be written."""


class EmbeddingStore:
    """One model's embeddings. Files are written atomically: any number of workers share a folder."""

    def __init__(self, cfg: GeneratorConfig, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.dtype = resolve_dtype(cfg.dtype, device.type)
        assert cfg.embedding_cache is not None  # callers check
        self.folder = Path(cfg.embedding_cache).expanduser() / model_key(cfg, self.dtype)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"generator.embedding_cache: cannot write {describe_os_error(error, self.folder)}"
            ) from None
        self.hits = self.misses = 0
        self.on_loaded: Callable[[str, torch.nn.Module], Any] = lambda _, module: module.to(self.device)

    # -- what is left out when loading --------------------------------------------------------------------------

    def settled(self) -> dict[str, Any] | None:
        """model.json: {"skip": [component names], "reason": why none, "mode": call mode}; None before a probe."""
        try:
            note = read_json_object(self.folder / "model.json", "remove the cache")
            return note if note["format"] == _FORMAT else None
        except (InputError, KeyError):
            return None

    def skippable(self) -> list[str]:
        """Text encoders that need not be loaded before a prompt is missing."""
        note = self.settled()
        if note is None:
            return []
        if note["skip"]:
            log.info("embedding cache %s: %s not loaded unless needed", self.folder, ", ".join(note["skip"]))
        return list(note["skip"])

    def in_order(self, call_modes: list[CallMode]) -> list[CallMode]:
        """The mode that an earlier run settled on first: others may encode prompts that are not cached."""
        settled_mode = (self.settled() or {}).get("mode")
        return sorted(call_modes, key=lambda mode: mode.to_dict() != settled_mode)

    def settle(self, pipe: Any, mode: CallMode, works: Callable[[], bool]) -> None:
        """Tries the pipeline without its text encoders, on cached calls, and writes down whether that `works`."""
        if self.settled() is not None:
            return
        names = sorted(n for n, c in pipe.components.items() if n.startswith("text_encoder") and c is not None)
        reason = ""
        if not names:
            reason = "the pipeline has no text encoder"
        else:
            with _without(pipe, names):
                before = self.misses
                try:
                    if not works():
                        reason = "it gives other denoiser inputs without its text encoders"
                except Exception as error:  # whatever a pipeline raises without them
                    reason = f"it needs them besides encode_prompt ({type(error).__name__}: {str(error)[:160]})"
                if not reason and self.misses > before:
                    reason = "its prompts are not encoded by arguments that can be stored"
        if reason:
            log.info("%s: text encoders are always loaded: %s", type(pipe).__name__, reason)
        note = {
            "format": _FORMAT,
            "pipeline": type(pipe).__name__,
            "skip": [] if reason else names,
            "reason": reason,
            "mode": mode.to_dict(),
        }
        atomic_write(self.folder / "model.json", json.dumps(note, indent=1).encode())

    # -- the pipeline's encode_prompt ---------------------------------------------------------------------------

    def install(self, pipe: Any) -> None:
        """Makes the pipeline read the cache before it encodes a prompt."""
        encode = getattr(pipe, "encode_prompt", None)
        if encode is None:
            log.info("%s has no encode_prompt: generator.embedding_cache is not used", type(pipe).__name__)
            return
        signature = inspect.signature(encode)

        def stored(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            device = arguments.pop("device", None) or pipe._execution_device
            try:
                path = self.folder / f"{_digest(arguments)}.safetensors"
            except _NotStorable:
                path = None
            cached = None if path is None else self._read(path, device)
            if cached is not None:
                self.hits += 1
                return cached[0]
            self.misses += 1
            self._complete(pipe)
            embeddings = encode(*args, **kwargs)
            if path is not None:
                self._write(path, embeddings)
            return embeddings

        pipe.encode_prompt = stored

    def _complete(self, pipe: Any) -> None:
        """Loads the text encoders that were left out."""
        index = model_index(self.cfg)
        for name in sorted(index):
            if name.startswith("text_encoder") and index[name] and getattr(pipe, name, None) is None:
                log.info("embedding cache: a prompt is missing, loading %s", name)
                module = load_component(self.cfg, name, self.dtype)
                if module is not None:
                    module.eval().requires_grad_(False)
                    setattr(pipe, name, module)
                    self.on_loaded(name, module)

    def _read(self, path: Path, device: torch.device | str) -> tuple[Any] | None:
        """The stored tree in a tuple (it may itself be None); None where there is no sound file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                tree = parse_json(file.metadata()["tree"], str(path), "remove it")
                return (_rebuilt(tree, lambda name: file.get_tensor(name).to(device)),)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, InputError) as error:
            log.warning("embedding cache: %s cannot be read (%s), encoding again", path, error)
            return None

    def _write(self, path: Path, made: Any) -> None:
        from safetensors.torch import save

        tensors: dict[str, torch.Tensor] = {}
        try:
            tree = _described(made, tensors)
        except _NotStorable as error:
            log.info("embedding cache: not stored: %s", error)
            return
        atomic_write(path, save(tensors, {"tree": json.dumps(tree)}))


@contextmanager
def _without(pipe: Any, names: list[str]) -> Iterator[None]:
    kept = {name: getattr(pipe, name) for name in names}
    for name in names:
        setattr(pipe, name, None)
    try:
        yield
    finally:
        for name, module in kept.items():
            setattr(pipe, name, module)


# -- keys --------------------------------------------------------------------------------------------------------------


def model_key(cfg: GeneratorConfig, dtype: torch.dtype) -> str:
    """A digest of what decides an embedding besides the prompt."""
    index = model_index(cfg)
    digest = hashlib.blake2b(f"{_FORMAT}|{cfg.pipeline or index.get('_class_name')}|{dtype}".encode(), digest_size=12)
    root = Path(cfg.pretrained).expanduser()
    if root.is_dir():
        for folder in sorted(p for p in root.iterdir() if p.is_dir() and p.name.startswith(_LANGUAGE)):
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                digest.update(f"{path.relative_to(root)}|{path.stat().st_size}|".encode())
                digest.update(_content(path))
    else:
        digest.update(f"{cfg.pretrained}|{_commit(cfg)}".encode())
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    """A digest of a file; of a large one only of its ends and places in between (training changes every weight)."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=12)
    with open(path, "rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for i in range(_SAMPLES):
                file.seek((size - _CHUNK) * i // (_SAMPLES - 1))
                digest.update(file.read(_CHUNK))
    return digest.digest()


def _commit(cfg: GeneratorConfig) -> str:
    """The commit of a hub checkpoint, from the local hub cache; its revision where that is unknown."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(cfg.pretrained, "model_index.json", revision=cfg.revision)
    return Path(path).parent.name if isinstance(path, (str, os.PathLike)) else str(cfg.revision)


def _digest(value: Any) -> str:
    """Equal for equal arguments, by content. Raises `_NotStorable`."""
    digest = hashlib.blake2b(digest_size=16)

    def add(item: Any) -> None:
        if isinstance(item, dict):
            digest.update(b"{")
            for key in sorted(item):
                digest.update(repr(key).encode())
                add(item[key])
            digest.update(b"}")
        elif isinstance(item, (list, tuple)):
            digest.update(b"[")
            for entry in item:
                add(entry)
            digest.update(b"]")
        elif isinstance(item, torch.Tensor):
            flat = item.detach().cpu().contiguous().flatten()
            digest.update(f"{item.dtype}{list(item.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(item, np.ndarray):
            digest.update(f"{item.dtype}{item.shape}".encode() + np.ascontiguousarray(item).tobytes())
        elif hasattr(item, "tobytes") and hasattr(item, "mode"):  # a PIL image
            digest.update(f"{item.mode}{item.size}".encode() + item.tobytes())
        elif isinstance(item, (str, int, float, bool, type(None), torch.dtype)):
            digest.update(f"{type(item).__name__}{item!r};".encode())
        else:
            raise _NotStorable(f"an argument of type {type(item).__name__}")

    add(value)
    return digest.hexdigest()


# -- trees -------------------------------------------------------------------------------------------------------------


def _described(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree as JSON, its tensors by name; one whose rows are all equal (a group's prompt) as one row."""
    if isinstance(node, torch.Tensor):
        name = str(len(tensors))
        value = node.detach().cpu()
        rows = value.shape[0] if value.ndim > 1 else 0
        repeated = rows > 1 and bool((value == value[:1]).all())
        tensors[name] = (value[:1] if repeated else value).contiguous().clone()
        return {"tensor": name, "rows": rows if repeated else 0}
    if isinstance(node, (list, tuple)):
        if hasattr(node, "_fields"):
            raise _NotStorable(f"encode_prompt returns a {type(node).__name__}")
        return {type(node).__name__: [_described(entry, tensors) for entry in node]}
    if isinstance(node, dict):
        if type(node) is not dict:
            raise _NotStorable(f"encode_prompt returns a {type(node).__name__}")
        return {"dict": [[key, _described(entry, tensors)] for key, entry in node.items()]}
    if isinstance(node, (str, int, float, bool, type(None))):
        return {"plain": node}
    raise _NotStorable(f"encode_prompt returns a {type(node).__name__}")


def _rebuilt(node: dict[str, Any], tensor: Callable[[str], torch.Tensor]) -> Any:
    if "tensor" in node:
        value = tensor(node["tensor"])
        return value.repeat(node["rows"], *[1] * (value.ndim - 1)) if node["rows"] else value
    if "plain" in node:
        return node["plain"]
    if "dict" in node:
        return {key: _rebuilt(entry, tensor) for key, entry in node["dict"]}
    entries = [_rebuilt(entry, tensor) for entry in (node["list"] if "list" in node else node["tuple"])]
    return entries if "list" in node else tuple(entries)
