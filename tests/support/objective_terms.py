"""What objectives are given in tests: one take whose policy has moved away from the rollout's, by a known amount."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.config.parts import OBJECTIVES
from pipeline.rl.objectives import Objective
from pipeline.rl.objectives.denoising import DenoisingTerms
from pipeline.rl.objectives.transitions import TransitionTerms
from pipeline.rl.samplers import Transition
from pipeline.rl.samplers.base import flow_step

D = 64  # dimensions of the sample


def objective(name: str, **options: Any) -> Any:
    """The objective `name` with these options."""
    part = OBJECTIVES.get(name)(**options)
    assert isinstance(part, Objective)
    return part


def moved_terms(advantage: float, shift: float = 0.0, seed: int = 0) -> tuple[TransitionTerms, torch.Tensor]:
    """The policy's mean is moved by `shift` stds from the rollout's; returns the terms and the velocity leaf [1, D]."""
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(1, D, generator=generator).double(), torch.randn(1, D, generator=generator).double()
    old = flow_step(x, v, 0.8, 0.7, 0.6)
    x_next = old.mean + old.std * torch.randn(1, D, generator=generator)
    slope = (1 + 0.36 * 0.2 / 1.6) * -0.1
    leaf = (v + shift * old.std / slope).requires_grad_()
    new = flow_step(x, leaf, 0.8, 0.7, 0.6)
    terms = TransitionTerms(
        log_prob=((-0.5 * ((x_next - new.mean) / new.std) ** 2).mean(1)),
        old_log_prob=((-0.5 * ((x_next - old.mean) / old.std) ** 2).mean(1)),
        advantages=torch.tensor([advantage]).double(),
        step=new,
        old_mean=old.mean,
    )
    return terms, leaf


def ratio_terms(advantage: float, ratio: float) -> tuple[TransitionTerms, torch.Tensor]:
    """The ratio itself is given; returns the terms and the log-prob leaf [1]."""
    log_prob = torch.tensor([ratio]).log().requires_grad_()
    step = Transition(torch.zeros(1, 4), 0.5, 0.1)
    terms = TransitionTerms(log_prob, torch.zeros(1), torch.tensor([advantage]), step, torch.zeros(1, 4))
    return terms, log_prob


def denoising_terms(
    output: torch.Tensor,
    target: torch.Tensor,
    advantages: torch.Tensor,
    old_output: torch.Tensor | None = None,
    level: float = 1.0,
    reference: torch.Tensor | None = None,
) -> DenoisingTerms:
    """Of a flow model at noise level `level`."""
    return DenoisingTerms(output, target, advantages, old_output, torch.tensor(level), reference)
