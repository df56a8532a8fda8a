"""GRPO-Guard: GRPO whose ratio is centred and whose gradient is equally strong at every noise level."""

from __future__ import annotations

from dataclasses import replace

from pipeline.rl.objectives.base import PolicyLoss, TransitionObjective, TransitionTerms, clipped_loss, register


@register("grpo_guard")
class GRPOGuard(TransitionObjective):
    """GRPO-Guard (arXiv 2510.22319): the ratio's mean drift b is added back, its spread made the same at every step.

    ratio = exp((logp - logp_old + b) S), b = mean_D |mean - mean_old|^2 / (2 S^2), S = std; the loss is divided by dt.
    """

    needs_old_mean = True
    samplers = ("flow_sde", "dance_sde")

    def loss(self, terms: TransitionTerms) -> PolicyLoss:
        drift = terms.divergence()
        ratio = ((terms.log_prob - terms.old_log_prob + drift) * terms.step.std).exp()
        clipped = clipped_loss(terms.advantages, ratio, terms.clip_low, terms.clip_high)
        return replace(clipped, loss=clipped.loss / terms.step.dt)
