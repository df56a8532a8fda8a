"""The device that a section measures on: its clock, its memory and what it can do at most."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

GIB = 2**30
REPEATS = 3
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "torchao", "ray")


@dataclass(frozen=True)
class Card:
    """`device`: cuda or cpu. `tiny`: the smallest shapes, which try the code on a CPU."""

    device: str
    tiny: bool

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def seconds(self, call: Callable[[], object]) -> float:
        """Median wall time of a call with all that it sets going, after one that warms up."""
        repeats = 1 if self.tiny else REPEATS
        times = []
        for _ in range(repeats + 1):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - began)
        return sorted(times[1:])[repeats // 2]

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def memory_gib(self) -> float | None:
        """Now allocated by tensors."""
        return torch.cuda.memory_allocated() / GIB if self.is_gpu else None

    def peak_gib(self, call: Callable[[], object]) -> float | None:
        """The most that tensors held during a call."""
        if not self.is_gpu:
            call()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() / GIB

    def free(self) -> None:
        """Gives cached memory back, so that one part of a section does not weigh on the next."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def matmul_tflops(self) -> float:
        """Rate of a large bfloat16 matrix product: what the model's utilisation is a share of."""
        size, products = (256, 1) if self.tiny else (8192, 20)
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))

        def multiply() -> None:
            for _ in range(products):
                a @ b

        return products * 2 * size**3 / self.seconds(multiply) / 1e12


def facts(card: Card) -> dict[str, Any]:
    """Versions, the card, and its rate at matrix products and at copies."""
    found: dict[str, Any] = {"python": platform.python_version(), "device": card.device}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if card.is_gpu:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_gib": properties.total_memory / GIB,
            "cuda": torch.version.cuda,
        }
    numbers = torch.empty((1 if card.tiny else 256) * 2**20, device=card.device)
    copied = torch.empty_like(numbers)
    found["copy_gb_per_s"] = 2 * numbers.nbytes / card.seconds(lambda: copied.copy_(numbers)) / 1e9
    return found | {"matmul_bf16_tflops": card.matmul_tflops()}
