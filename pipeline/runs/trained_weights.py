"""The trained weights in a checkpoint, for whoever samples with them or exports them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.core.errors import CheckpointError
from pipeline.core.types import WeightSet
from pipeline.generators import adapters
from pipeline.runs import checkpoint


def read_weights(folder: Path, kind: Literal["lora", "full"], ema: bool = True) -> WeightSet:
    """The weights of checkpoint `folder`; their EMA where asked for and kept. Raises `CheckpointError`."""
    tensors, _ = checkpoint.load(folder)
    has_ema = any(name.startswith("ema/") for name in tensors)
    prefix = "ema/" if ema and has_ema else "weights/"
    chosen = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not chosen:
        raise CheckpointError(f"checkpoint {folder}: holds no trained weights; use another one")
    return adapters.to_weight_set(kind, chosen)
