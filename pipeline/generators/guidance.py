"""Guidance rules: how a pipeline combines its denoiser outputs into what the scheduler receives.

The rule is identified by comparison, never assumed, and compared again at every recorded step. Named rules repeat the
pipelines' own arithmetic in the same order, so that the replayed value can be bitwise equal. Where none fits, a
combination that is linear in the outputs and the sample is fitted by least squares (several scales, skipped layers,
x0-space preconditioning).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.core.types import StepGuidance

Branches = Sequence[torch.Tensor]  # denoiser outputs, each [B, ...]

LINEAR_FIT = "linear in outputs and sample"


def _norm_rescaled(combined: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """Keeps the conditional output's norm over the last axis (Qwen-Image, Lumina2)."""
    return combined * (conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


def _norm_bounded(combined: torch.Tensor, conditional: torch.Tensor, low: float) -> torch.Tensor:
    """The same where it shrinks a token, to no less than `low` times (LongCat-Image's cfg_renorm_min)."""
    norms = conditional.norm(dim=-1, keepdim=True), combined.norm(dim=-1, keepdim=True)
    return combined * (norms[0] / (norms[1] + 1e-8)).clamp(min=low, max=1.0)


def _sample_rescaled(combined: torch.Tensor, conditional: torch.Tensor, phi: float) -> torch.Tensor:
    """guidance_rescale = phi: the conditional output's std per sample, in part (arXiv 2305.08891, section 3.4)."""
    dims = list(range(1, combined.ndim))
    rescaled = combined * (conditional.std(dim=dims, keepdim=True) / combined.std(dim=dims, keepdim=True))
    return rescaled if phi == 1.0 else phi * rescaled + (1 - phi) * combined


def _norm_capped(combined: torch.Tensor, conditional: torch.Tensor, cap: float) -> torch.Tensor:
    """Norm per sample at most `cap` times the conditional output's (Z-Image's cfg_normalization)."""
    dims = list(range(1, combined.ndim))
    new = torch.linalg.vector_norm(combined, dim=dims, keepdim=True)
    limit = torch.linalg.vector_norm(conditional, dim=dims, keepdim=True) * cap
    return torch.where(new > limit, combined * (limit / new), combined)


def _uncond_first(b: Branches, g: float) -> torch.Tensor:
    return b[0] + g * (b[1] - b[0])


def _cond_first(b: Branches, g: float) -> torch.Tensor:
    return b[1] + g * (b[0] - b[1])


def _cond_first_plus(b: Branches, g: float) -> torch.Tensor:
    return b[0] + g * (b[0] - b[1])


def _uncond_first_plus(b: Branches, g: float) -> torch.Tensor:
    return b[1] + g * (b[1] - b[0])


def _first_channels(b: Branches, g: float, conditional: int) -> torch.Tensor:
    """Guidance on the first three channels alone (Lumina-Next)."""
    if b[0].ndim < 4 or b[0].shape[1] <= 3:
        return torch.full_like(b[0], float("inf"))
    cond, uncond = b[conditional], b[1 - conditional]
    return torch.cat([uncond[:, :3] + g * (cond[:, :3] - uncond[:, :3]), cond[:, 3:]], dim=1)


@dataclass(frozen=True, slots=True)
class Rule:
    """A guidance formula that pipelines use."""

    branches: int  # denoiser outputs that it combines
    function: Callable[..., torch.Tensor]  # (branches, scale[, extra]) -> value [B, ...]


RULES: dict[str, Rule] = {
    "identity": Rule(1, lambda b, g: b[0]),
    "cfg uncond-first": Rule(2, _uncond_first),
    "cfg cond-first": Rule(2, _cond_first),
    "cfg cond-first, scale g+1": Rule(2, _cond_first_plus),
    "cfg uncond-first, scale g+1": Rule(2, _uncond_first_plus),
    "cfg cond-first, first 3 channels": Rule(2, lambda b, g: _first_channels(b, g, 0)),
    "cfg uncond-first, first 3 channels": Rule(2, lambda b, g: _first_channels(b, g, 1)),
    "cfg cond-first, token norm": Rule(2, lambda b, g: _norm_rescaled(_cond_first(b, g), b[0])),
    "cfg uncond-first, token norm": Rule(2, lambda b, g: _norm_rescaled(_uncond_first(b, g), b[1])),
    "cfg cond-first, token norm cap": Rule(2, lambda b, g, low=0.0: _norm_bounded(_cond_first(b, g), b[0], low)),
    "cfg cond-first, sample std": Rule(2, lambda b, g, phi=1.0: _sample_rescaled(_cond_first(b, g), b[0], phi)),
    "cfg uncond-first, sample std": Rule(2, lambda b, g, phi=1.0: _sample_rescaled(_uncond_first(b, g), b[1], phi)),
    "cfg cond-first, scale g+1, norm cap": Rule(
        2, lambda b, g, cap=1.0: _norm_capped(_cond_first_plus(b, g), b[0], cap)
    ),
}
LINEAR = [name for name in RULES if name.startswith("cfg") and not name.endswith(("norm", "std", "cap"))]
WITH_EXTRA = [name for name in RULES if name.endswith(("std", "cap"))]  # take a second number

# How an output is sliced to the scheduler's sample where it is larger.
OUTPUT_SLICES: dict[str, Callable[[torch.Tensor, torch.Size], torch.Tensor]] = {
    "whole": lambda out, like: out,
    "reshaped": lambda out, like: out.reshape(like),
    "first channels (learned variance dropped)": lambda out, like: out[:, : like[1]],
    "first tokens": lambda out, like: out[:, : like[1]],
    "last tokens": lambda out, like: out[:, -like[1] :],
}


def output_slice_for(output: torch.Size, like: torch.Size) -> str | None:
    """The key of OUTPUT_SLICES that gives `output` the shape `like`; None if there is none."""
    if tuple(output) == tuple(like):
        return "whole"
    if [n for n in output[1:] if n > 1] == [n for n in like[1:] if n > 1]:
        return "reshaped"  # an axis of length 1 more or less
    if len(output) == len(like) and output[1] > like[1] and output[2:] == like[2:]:
        return "first tokens" if len(output) == 3 else "first channels (learned variance dropped)"
    return None


@dataclass(frozen=True, slots=True)
class Fit:
    """A rule with its numbers, and how closely it gives the target."""

    guidance: StepGuidance
    sign: float
    error: float  # largest difference, relative to the target's largest value
    named: bool = True  # the scale is one that the pipeline call itself names, not one that was solved for

    @property
    def rule(self) -> str:
        return self.guidance.rule

    @property
    def order(self) -> tuple[bool, bool, bool, float]:
        """Sorts fits: exact to rounding first; among these, named scales, then positive ones (the same guidance with
        its branches swapped needs a negative scale)."""
        return self.error > 1e-6, not self.named, self.guidance.scale < 0.0, self.error


def evaluate(guidance: StepGuidance, branches: Branches, sample: torch.Tensor, sign: float) -> torch.Tensor:
    """What the scheduler receives [B, ...], by a rule and its numbers."""
    extra = guidance.extra
    if guidance.rule == LINEAR_FIT:
        value: Any = sum(w * b for w, b in zip(extra, branches, strict=False))
        return value if extra[-1] == 0.0 else value + extra[-1] * sample
    value = RULES[guidance.rule].function(branches, guidance.scale, *extra)
    return -value if sign < 0 else value


def solve_scale(name: str, branches: Branches, target: torch.Tensor) -> float | None:
    """The guidance scale that a linear rule needs to give `target`, by least squares; None if it is undetermined.

    Each linear rule is affine in g: rule(g) = rule(0) + g (rule(1) - rule(0)).
    """
    rule = RULES[name].function
    at_zero = rule(branches, 0.0).double()
    slope = (rule(branches, 1.0).double() - at_zero).flatten()
    power = float(slope @ slope)
    if power == 0.0 or not math.isfinite(power):
        return None
    return float(((target.double() - at_zero).flatten() @ slope) / power)


def _linear_weights(branches: Branches, sample: torch.Tensor, target: torch.Tensor) -> tuple[float, ...] | None:
    """Least-squares weights of the outputs and of the sample (0 where it is not needed); None if undetermined."""
    weights: tuple[float, ...] | None = None
    for columns in (list(branches), [*branches, sample]):
        matrix = torch.stack([c.flatten().double() for c in columns], 1)
        gram = matrix.T @ matrix
        if float(torch.linalg.cond(gram)) > 1e12:
            return None
        solution = torch.linalg.solve(gram, matrix.T @ target.flatten().double())
        error = float((matrix @ solution - target.flatten().double()).abs().max())
        weights = tuple(float(f"{w:.9g}") for w in solution.tolist())
        if error <= 1e-5 * max(float(target.abs().max()), 1e-30):
            return weights if len(columns) > len(branches) else (*weights, 0.0)
    return weights


def _rounded(value: float | None) -> list[float]:
    return [] if value is None or not math.isfinite(value) else [float(f"{value:.5g}"), value]


def candidates(branches: Branches, sample: torch.Tensor, target: torch.Tensor, scales: Iterable[float]) -> list[Fit]:
    """Every rule for this number of branches with the numbers that suit it best, best first.

    `scales`: numbers that the pipeline call itself names (guidance scales, rescale factors); they come first, so that
    a rule is bitwise equal where it can be. Named rules are preferred to a linear fit when they are good enough.
    """
    named_scales = list(dict.fromkeys(float(scale) for scale in scales))
    peak = float(target.abs().max()) or 1.0
    fits: list[Fit] = []

    def consider(rule: str, scale: float, extra: tuple[float, ...], sign: float) -> None:
        guidance = StepGuidance(rule, scale, extra)
        error = float((evaluate(guidance, branches, sample, sign) - target).abs().max()) / peak
        named = scale in named_scales and rule != LINEAR_FIT
        fits.append(Fit(guidance, sign, float("inf") if math.isnan(error) else error, named))

    for name, rule in RULES.items():
        if rule.branches != len(branches):
            continue
        for sign in (1.0, -1.0):
            if rule.branches == 1:
                consider(name, 1.0, (), sign)
                continue
            solved = _rounded(solve_scale(name, branches, sign * target)) if name in LINEAR else []
            for scale in [*named_scales, *solved]:
                consider(name, scale, (), sign)
                for extra in named_scales if name in WITH_EXTRA else []:
                    if 0.0 < extra <= 2.0 and extra != 1.0:
                        consider(name, scale, (extra,), sign)
    ranked = sorted(fits, key=lambda fit: fit.order)
    if ranked and ranked[0].error <= 1e-5:
        return ranked
    weights = _linear_weights(branches, sample, target)
    if weights is not None:
        consider(LINEAR_FIT, 1.0, weights, 1.0)
    return sorted(fits, key=lambda fit: fit.order)
