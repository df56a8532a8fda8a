"""Flow-DPPO: a divergence threshold instead of the ratio clip."""

from __future__ import annotations

from pipeline.rl.objectives.base import PolicyLoss, TransitionObjective, TransitionTerms, register


@register("flow_dppo")
class FlowDPPO(TransitionObjective):
    """Flow-DPPO (arXiv 2606.11025): no ratio clip; a take is dropped where its KL to the rollout policy exceeds
    `clip_high` and the update would move it further away. Dropped takes still count in the mean."""

    needs_old_mean = True

    def loss(self, terms: TransitionTerms) -> PolicyLoss:
        ratio = (terms.log_prob - terms.old_log_prob).exp()
        divergence = terms.divergence().detach()
        away_up = (terms.advantages > 0) & (ratio > 1.0)
        away_down = (terms.advantages < 0) & (ratio < 1.0)
        dropped = (divergence >= terms.clip_high) & (away_up | away_down)
        return PolicyLoss(
            loss=(-terms.advantages * ratio).masked_fill(dropped, 0.0),
            ratio=ratio.detach(),
            clipped_low=(dropped & away_down).float(),
            clipped_high=(dropped & away_up).float(),
        )
