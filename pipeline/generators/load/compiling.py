"""Compiled denoiser blocks (`generator.compile`), in rollout workers and in the learner alike.

A denoiser is a stack of blocks of one class; torch compiles the class once for all of them (regional compilation), for
each shape that occurs. Shapes are kept exact: on a CPU, kernels for any batch size gain nothing over none at all.
Compiled code is kept on disk, so that the next process loads in seconds what the first took longer to make.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from pipeline.core.errors import UnsupportedPolicyError, one_line

log = logging.getLogger("rushes.generators")
_SHAPES = 64  # compiled per class of blocks; further ones run without
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compile_blocks(modules: Mapping[str, torch.nn.Module], device: torch.device) -> int:
    """Compiles the blocks of each module, in place and lazily: at the first call of each shape. Returns how many there
    are; 0 where this machine cannot compile, which is logged. Call it once LoRA layers are there.

    Raises UnsupportedPolicyError for a module that has no blocks.
    """
    if (reason := cannot_compile(device.type)) is not None:
        log.warning("generator.compile: this machine cannot (%s); it goes on without", reason)
        return 0
    count = 0
    for name, module in modules.items():
        blocks = list(blocks_of(module))
        if not blocks:
            raise UnsupportedPolicyError(
                f"generator.compile: {name} ({type(module).__name__}) has no blocks; set generator.compile=false"
            )
        for block in blocks:
            block.compile(**_options(device.type))
        count += len(blocks)
    return count


def blocks_of(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Those whose class diffusers names as repeated; where it names none, the members of the module's own lists of at
    least two of a class."""
    named = set(getattr(module, "_repeated_blocks", None) or ())
    if named:
        yield from (part for part in module.modules() if type(part).__name__ in named)
        return
    for part in module.children():
        if isinstance(part, torch.nn.ModuleList):
            counts = Counter(type(block) for block in part)
            yield from (block for block in part if counts[type(block)] > 1)


@cache
def cannot_compile(device: str) -> str | None:
    """Why torch cannot compile for the device here, found by trying; None if it can. Takes seconds, once a process."""
    if "recompile_limit" not in signature(torch.compile).parameters:
        return f"torch {torch.__version__} is older than 2.13"
    if _CACHE not in os.environ and (folder := private_folder(_candidates())) is not None:
        os.environ[_CACHE] = str(folder)  # torch's default is a folder in /tmp whose name anyone can take first
    try:
        torch.compile(_trial, **_options(device))(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing or broken compiler leads to
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def _trial(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + 1.0


def _options(device: str) -> dict[str, Any]:
    """Of `torch.compile`; given with each call, since torch's own settings hold for one thread, and lanes have theirs.

    On a CPU, blocks run as C++ throughout: the functions that Python calls otherwise keep its lock, for which the other
    lanes would wait. And they are compiled in this process: a pool of compilers outweighs a small model.
    """
    options = {"cpp_wrapper": True, "compile_threads": 1, "cpp.use_decompose_tanh": True} if device == "cpu" else {}
    return {"dynamic": False, "recompile_limit": _SHAPES, "options": options}


def _candidates() -> Iterable[Path]:
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rushes" / "compiled"


def private_folder(candidates: Iterable[Path]) -> Path | None:
    """The first that exists or can be made, and is this user's alone; None if there is none."""
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        found = folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    return None
