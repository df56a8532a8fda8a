"""Advantage-weighted matching: the policy gradient with the flow-matching likelihood of finished takes.

Takes are drawn without noise; each is noised again, and the denoiser's flow-matching error stands for its negative
log-likelihood (AWM, arXiv 2509.25050). The policy itself is trained the way it was pretrained, so far fewer takes are
needed than with the log-probs of injected noise (docs/design.md has the measurement).
"""

from __future__ import annotations

from pipeline.rl.objectives.base import DenoisingObjective, DenoisingTerms, PolicyLoss, register


@register("awm")
class AdvantageWeightedMatching(DenoisingObjective):
    """AWM (arXiv 2509.25050): log p := -mean_D |output - target|^2, loss = -A exp(log p - log p_old).

    The same noise is on both sides of the ratio, and it is only defined on-policy, where it is 1 and the gradient of
    the loss is A grad |output - target|^2. Their paper's model is a flow; the same holds for any prediction.
    """

    max_updates_per_step = 1

    def loss(self, terms: DenoisingTerms) -> PolicyLoss:
        log_p = -(terms.output - terms.target).pow(2).flatten(1).mean(dim=1)
        ratio = (log_p - log_p.detach()).exp()
        never = ratio.new_zeros(ratio.shape)
        return PolicyLoss(-terms.advantages * ratio, ratio.detach(), clipped_low=never, clipped_high=never)
