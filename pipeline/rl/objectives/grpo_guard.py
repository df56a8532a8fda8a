"""GRPO-Guard: GRPO whose ratio is centred and whose gradient is equally strong at every noise level."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.rl.objectives.base import Requirements, register
from pipeline.rl.objectives.transitions import ClippedObjective, PolicyLoss, TransitionTerms

if TYPE_CHECKING:
    import torch


@register("grpo_guard")
class GRPOGuard(ClippedObjective):
    """GRPO-Guard (arXiv 2510.22319): the ratio's mean drift b is added back, its spread made the same at every step.

    ratio = exp((logp - logp_old + b) S), b = mean_D |mean - mean_old|^2 / (2 S^2), S = std; the loss is divided by dt.
    """

    @property
    def requirements(self) -> Requirements:
        return replace(super().requirements, old_mean=True, samplers=("flow_sde", "dance_sde"))

    def log_ratio(self, terms: TransitionTerms) -> torch.Tensor:
        return (terms.log_prob - terms.old_log_prob + terms.divergence()) * terms.step.std

    def policy_loss(self, terms: TransitionTerms) -> PolicyLoss:
        clipped = super().policy_loss(terms)
        return replace(clipped, loss=clipped.loss / terms.step.dt)
