"""GRPO: the clipped policy gradient on single denoising steps."""

from __future__ import annotations

from pipeline.rl.objectives.base import PolicyLoss, TransitionObjective, TransitionTerms, clipped_loss, register


@register("grpo")
class GRPO(TransitionObjective):
    """GRPO on denoising steps (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818)."""

    def loss(self, terms: TransitionTerms) -> PolicyLoss:
        ratio = (terms.log_prob - terms.old_log_prob).exp()
        return clipped_loss(terms.advantages, ratio, terms.clip_low, terms.clip_high)
