"""GRPO: the clipped policy gradient on single denoising steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from pipeline.rl.objectives.base import register
from pipeline.rl.objectives.transitions import ClippedObjective, PolicyLoss, TransitionTerms


@register("grpo")
class GRPO(ClippedObjective):
    """GRPO on denoising steps (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818).

    The gradient of a log-prob goes with 1 / std, so steps that draw little noise weigh most. `step_weight: std` takes
    that out (TempFlow-GRPO's noise-aware weighting, arXiv 2508.04324, but for its scale).
    """

    step_weight: Literal["none", "std"] = Field(
        "none", description="Weigh the loss of a step by the std of its noise (TempFlow-GRPO), or do not."
    )

    def policy_loss(self, terms: TransitionTerms) -> PolicyLoss:
        policy = super().policy_loss(terms)
        return policy if self.step_weight == "none" else replace(policy, loss=policy.loss * terms.step.std)
