"""Compiles denoiser blocks (`generator.compile`), in rollout workers and in the learner alike.

A denoiser is a stack of blocks of one class; torch compiles the class once for all of them (regional compilation), for
each shape that occurs. Shapes stay static: on a CPU, kernels for dynamic batch sizes are no faster than eager code.
Compiled code is cached on disk, so that the next process loads in seconds what the first took longer to compile.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from pipeline.core.errors import UnsupportedPolicyError, one_line
from pipeline.generators.load.blocks import repeated_blocks

log = logging.getLogger("rushes.generators")
_SHAPES = 64  # compiled per class of blocks; further ones run in eager mode
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compile_blocks(modules: Mapping[str, torch.nn.Module], device: torch.device) -> int:
    """Compiles the blocks of each module, in place and lazily: at the first call of each shape. Returns their number;
    0 where this machine cannot compile, which is logged. Call it after LoRA layers have been added.

    Raises UnsupportedPolicyError for a module that has no blocks.
    """
    if (reason := cannot_compile(device.type)) is not None:
        log.warning("generator.compile: this machine cannot (%s); running without", reason)
        return 0
    count = 0
    for name, module in modules.items():
        blocks = repeated_blocks(module).values()
        if not blocks:
            raise UnsupportedPolicyError(
                f"generator.compile: {name} ({type(module).__name__}) has no blocks; set generator.compile=false"
            )
        for block in blocks:
            block.compile(**_options(device.type))
        count += len(blocks)
    return count


@cache
def cannot_compile(device: str) -> str | None:
    """Why torch cannot compile for the device on this machine; None if it can. Tried once per process, for seconds."""
    if "recompile_limit" not in signature(torch.compile).parameters:
        return f"torch {torch.__version__} is older than 2.13"
    if _CACHE not in os.environ and (folder := private_folder(_candidates())) is not None:
        os.environ[_CACHE] = str(folder)  # torch's default is a folder in /tmp whose name anyone can take first
    try:
        torch.compile(_sample_function, **_options(device))(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing or broken compiler leads to
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def _sample_function(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + 1.0


def _options(device: str) -> dict[str, Any]:
    """Options of `torch.compile`, passed with each call: torch's global settings are per thread, and so are replicas.

    On a CPU, blocks run as C++ throughout: otherwise their Python wrappers would hold the GIL, for which the other
    replicas wait. They are compiled in this process: a pool of compiler processes costs more than a small model.
    """
    options = {"cpp_wrapper": True, "compile_threads": 1, "cpp.use_decompose_tanh": True} if device == "cpu" else {}
    return {"dynamic": False, "recompile_limit": _SHAPES, "options": options}


def _candidates() -> Iterable[Path]:
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rushes" / "compiled"


def private_folder(candidates: Iterable[Path]) -> Path | None:
    """The first that exists or can be created, and that only this user can write; None if there is none."""
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    return None
