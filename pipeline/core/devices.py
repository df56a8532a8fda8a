"""Torch devices and dtypes by their names in the config; `auto` depends on the machine. Imports torch lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.errors import ConfigError
from pipeline.core.reading import shown

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU. Raises ConfigError for a device that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: found {shown(name)}; expected auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: found {shown(name)}, but torch sees no GPU here; use auto or cpu")
    return device


def named_dtype(name: str) -> torch.dtype:
    """Raises ConfigError for a name that is not in DTYPES."""
    import torch

    if name not in DTYPES:
        raise ConfigError(f"dtype: found {shown(name)}; expected one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def resolve_dtype(name: str, device_type: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on the CPU, where bfloat16 is slower. `device_type`: cuda or cpu."""
    if name == "auto":
        return named_dtype("bfloat16" if device_type == "cuda" else "float32")
    return named_dtype(name)
