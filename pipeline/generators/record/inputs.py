"""Compares the denoiser inputs of two recordings, to tell what they depend on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from pipeline.core.tensors import map_leaves
from pipeline.generators.record.recording import RawStep
from pipeline.generators.spec import InputKey, StepInputKey, call_keys

TOLERANCE = 1e-5  # relative; the same code on the same prompts gives equal inputs


def denoiser_inputs(steps: Iterable[RawStep]) -> Iterator[tuple[StepInputKey, torch.Tensor]]:
    """Every tensor that the denoisers are given."""
    for step in steps:
        for key, call in zip(call_keys(len(step.calls)), step.calls, strict=True):
            leaves: dict[str, object] = {}
            map_leaves(leaves.setdefault, call.inputs)
            for path, leaf in leaves.items():
                if isinstance(leaf, torch.Tensor):
                    yield StepInputKey(step.index, InputKey(key, path)), leaf


def same_inputs(steps: Iterable[RawStep], others: Iterable[RawStep]) -> bool:
    """Whether the denoisers are given the same inputs, to rounding."""
    a, b = dict(denoiser_inputs(steps)), dict(denoiser_inputs(others))
    return a.keys() == b.keys() and all(relative_difference(a[key], b[key]) <= TOLERANCE for key in a)


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of `b`; infinite where shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    a, b = a.float(), b.to(a.device).float()
    return float((a - b).abs().max()) / max(float(b.abs().max()), 1e-6)
