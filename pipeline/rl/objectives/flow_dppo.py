"""Flow-DPPO: a divergence threshold instead of the ratio clip."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from pipeline.config.sections.base import Positive
from pipeline.rl.objectives.base import Requirements, register
from pipeline.rl.objectives.transitions import PolicyLoss, TransitionObjective, TransitionTerms


@register("flow_dppo")
class FlowDPPO(TransitionObjective):
    """Flow-DPPO (arXiv 2606.11025): no ratio clip; a take is dropped where its KL to the rollout policy exceeds
    `threshold` and the update would move it further away. Dropped takes still count in the mean."""

    threshold: Positive = Field(1e-4, description="Largest KL to the rollout policy, per dimension.")

    @property
    def requirements(self) -> Requirements:
        return replace(super().requirements, old_mean=True)

    def policy_loss(self, terms: TransitionTerms) -> PolicyLoss:
        ratio = (terms.log_prob - terms.old_log_prob).exp()
        divergence = terms.divergence().detach()
        away_up = (terms.advantages > 0) & (ratio > 1.0)
        away_down = (terms.advantages < 0) & (ratio < 1.0)
        dropped = (divergence >= self.threshold) & (away_up | away_down)
        return PolicyLoss(
            loss=(-terms.advantages * ratio).masked_fill(dropped, 0.0),
            ratio=ratio.detach(),
            clipped_low=(dropped & away_down).float(),
            clipped_high=(dropped & away_up).float(),
        )
