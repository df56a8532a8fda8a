"""Advantage-weighted matching: the policy gradient with the flow-matching likelihood of finished takes.

Takes are drawn without noise; each is noised again, and the denoiser's flow-matching error stands for its negative
log-likelihood (AWM, arXiv 2509.25050). The policy itself is trained the way it was pretrained, so far fewer takes are
needed than with the log-probs of injected noise (docs/design.md has the measurement).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.rl.objectives.base import Requirements, register
from pipeline.rl.objectives.denoising import DenoisingObjective, DenoisingTerms

if TYPE_CHECKING:
    import torch


@register("awm")
class AdvantageWeightedMatching(DenoisingObjective):
    """AWM (arXiv 2509.25050): log p := -mean_D |output - target|^2, loss = -A exp(log p - log p_old).

    The same noise is on both sides of the ratio, and it is only defined on-policy, where it is 1 and the gradient of
    the loss is A grad |output - target|^2. Their paper's model is a flow; the same holds for any prediction.
    """

    @property
    def requirements(self) -> Requirements:
        return replace(super().requirements, max_updates=1, max_staleness=0)

    def policy_loss(self, terms: DenoisingTerms) -> torch.Tensor:
        log_p = -(terms.output - terms.target).pow(2).flatten(1).mean(dim=1)
        return -terms.advantages * (log_p - log_p.detach()).exp()
