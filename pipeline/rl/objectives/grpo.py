"""GRPO: the clipped policy gradient on single denoising steps."""

from __future__ import annotations

from pipeline.rl.objectives.base import register
from pipeline.rl.objectives.transitions import ClippedObjective, PolicyLoss, TransitionTerms


@register("grpo")
class GRPO(ClippedObjective):
    """GRPO on denoising steps (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818)."""

    def policy_loss(self, terms: TransitionTerms) -> PolicyLoss:
        ratio = (terms.log_prob - terms.old_log_prob).exp()
        return self.clipped(terms.advantages, ratio)
