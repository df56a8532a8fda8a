"""Guidance rules: how a pipeline turns its denoiser outputs into what the scheduler is given.

The rule is found by comparison (`pipeline.generators.probe`), never assumed; each rule repeats the pipelines' own
arithmetic in the same order, so that the replayed value can be bitwise equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Branches = Sequence[torch.Tensor]  # denoiser outputs, each [B, ...]


def _norm_rescaled(combined: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """Keeps the conditional output's norm over the last axis (Qwen-Image, Lumina2)."""
    return combined * (conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


def _sample_rescaled(combined: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """guidance_rescale = 1: keeps the conditional output's std per sample (arXiv 2305.08891, section 3.4)."""
    dims = list(range(1, combined.ndim))
    return combined * (conditional.std(dim=dims, keepdim=True) / combined.std(dim=dims, keepdim=True))


RULES: dict[str, tuple[int, Callable[[Branches, float], torch.Tensor]]] = {
    # name: (number of branches, rule)
    "identity": (1, lambda b, g: b[0]),
    "negated": (1, lambda b, g: -b[0]),
    "cfg uncond-first": (2, lambda b, g: b[0] + g * (b[1] - b[0])),
    "cfg cond-first": (2, lambda b, g: b[1] + g * (b[0] - b[1])),
    "cfg cond-first, scale g+1": (2, lambda b, g: b[0] + g * (b[0] - b[1])),
    "cfg uncond-first, scale g+1": (2, lambda b, g: b[1] + g * (b[1] - b[0])),
    "cfg cond-first, negated": (2, lambda b, g: -(b[1] + g * (b[0] - b[1]))),
    "cfg cond-first, scale g+1, negated": (2, lambda b, g: -(b[0] + g * (b[0] - b[1]))),
    "cfg cond-first, token norm": (2, lambda b, g: _norm_rescaled(b[1] + g * (b[0] - b[1]), b[0])),
    "cfg uncond-first, token norm": (2, lambda b, g: _norm_rescaled(b[0] + g * (b[1] - b[0]), b[1])),
    "cfg cond-first, token norm, negated": (2, lambda b, g: -_norm_rescaled(b[1] + g * (b[0] - b[1]), b[0])),
    "cfg cond-first, sample std": (2, lambda b, g: _sample_rescaled(b[1] + g * (b[0] - b[1]), b[0])),
    "cfg uncond-first, sample std": (2, lambda b, g: _sample_rescaled(b[0] + g * (b[1] - b[0]), b[1])),
}

LINEAR = [name for name in RULES if name.startswith("cfg") and "norm" not in name and "std" not in name]

# How an output is cut to the scheduler's sample where it is larger.
CUTS: dict[str, Callable[[torch.Tensor, torch.Size], torch.Tensor]] = {
    "whole": lambda out, like: out,
    "first channels (learned variance dropped)": lambda out, like: out[:, : like[1]],
    "first tokens": lambda out, like: out[:, : like[1]],
}


def cut_for(output: torch.Size, like: torch.Size) -> str | None:
    """Which cut makes `output` the shape `like`; None if none does."""
    if tuple(output) == tuple(like):
        return "whole"
    if len(output) == len(like) and output[1] > like[1] and output[2:] == like[2:]:
        return "first tokens" if len(output) == 3 else "first channels (learned variance dropped)"
    return None


def solve_scale(name: str, branches: Branches, target: torch.Tensor) -> float | None:
    """The guidance scale that a linear rule needs to give `target`, by least squares; None if it is undetermined.

    Each linear rule is affine in g: rule(g) = rule(0) + g (rule(1) - rule(0)).
    """
    rule = RULES[name][1]
    at_zero = rule(branches, 0.0).double()
    slope = (rule(branches, 1.0).double() - at_zero).flatten()
    power = float(slope @ slope)
    if power == 0.0:
        return None
    return float(((target.double() - at_zero).flatten() @ slope) / power)
