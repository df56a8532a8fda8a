"""Advantage-weighted matching: the policy gradient with the flow-matching likelihood of finished takes.

Takes are drawn without noise; each is noised again, and the denoiser's flow-matching error stands for its negative
log-likelihood (AWM, arXiv 2509.25050). The policy itself is trained the way it was pretrained, so far fewer takes are
needed than with the log-probs of injected noise (docs/design.md has the measurement).
"""

from __future__ import annotations

import torch


def matching(
    velocity: torch.Tensor, target: torch.Tensor, advantages: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`velocity`, `target` = eps - x0: [b, ...]; `advantages` [b]. Returns (loss [b], logs [b]).

    log p := -mean_D |v - target|^2, ratio = exp(log p - log p_old) with the same noise on both sides. On-policy the
    ratio is 1 and the gradient of -A ratio is A grad |v - target|^2.
    """
    log_p = -(velocity - target).pow(2).flatten(1).mean(dim=1)
    ratio = torch.exp(log_p - log_p.detach())
    loss = -advantages * ratio
    none = torch.zeros_like(loss)
    logs = {"ratio": ratio.detach(), "policy_loss": loss.detach(), "clipped_low": none, "clipped_high": none}
    return loss, logs
