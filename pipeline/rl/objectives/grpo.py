"""Clipped policy-gradient losses over one denoising transition of a micro-batch of takes.

Each objective returns the loss per take [b] and what to log. All tensors float32; `log_prob`, `mean` carry gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.rl.samplers import Transition
from pipeline.rl.samplers.transition import gaussian_kl


@dataclass(frozen=True, slots=True)
class Terms:
    """What an objective sees of one transition for b takes."""

    log_prob: torch.Tensor  # [b] of x_next under the policy being trained, mean over dims
    old_log_prob: torch.Tensor  # [b] under the policy that made the rollout
    advantages: torch.Tensor  # [b]
    step: Transition  # mean [b, ...], std, dt of the policy being trained
    old_mean: torch.Tensor | None  # [b, ...] mean of the rollout policy, where the objective needs it
    clip_low: float
    clip_high: float

    def divergence(self) -> torch.Tensor:
        """KL to the rollout policy per dimension [b]. Raises ValueError where its mean was not recorded."""
        if self.old_mean is None:
            raise ValueError("this objective needs the rollout policy's mean, which was not recorded")
        return gaussian_kl(self.step, self.old_mean)


Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]


def _clipped(advantages: torch.Tensor, ratio: torch.Tensor, low: float, high: float) -> Loss:
    """max(-A r, -A clamp(r, 1 - low, 1 + high)) (PPO, arXiv 1707.06347 eq. 7), per take."""
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - low, 1.0 + high)
    stats = {
        "ratio": ratio.detach(),
        "clipped_low": ((ratio < 1.0 - low) & (advantages < 0)).float(),
        "clipped_high": ((ratio > 1.0 + high) & (advantages > 0)).float(),
    }
    return torch.maximum(unclipped, clipped), stats


def grpo(terms: Terms) -> Loss:
    """GRPO on denoising steps (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818)."""
    ratio = torch.exp(terms.log_prob - terms.old_log_prob)
    return _clipped(terms.advantages, ratio, terms.clip_low, terms.clip_high)


def grpo_guard(terms: Terms) -> Loss:
    """GRPO-Guard (arXiv 2510.22319): the ratio's mean drift b is added back, its spread made the same at every step.

    ratio = exp((logp - logp_old + b) S), b = mean_D |mean - mean_old|^2 / (2 S^2), S = std; the loss is divided by dt.
    """
    drift = terms.divergence()
    ratio = torch.exp((terms.log_prob - terms.old_log_prob + drift) * terms.step.std)
    loss, stats = _clipped(terms.advantages, ratio, terms.clip_low, terms.clip_high)
    return loss / terms.step.dt, stats


def flow_dppo(terms: Terms) -> Loss:
    """Flow-DPPO (arXiv 2606.11025): no ratio clip; a take is dropped where its KL to the rollout policy exceeds
    `clip_high` and the update would move it further away. Dropped takes still count in the mean."""
    ratio = torch.exp(terms.log_prob - terms.old_log_prob)
    divergence = terms.divergence().detach()
    away_up = (terms.advantages > 0) & (ratio > 1.0)
    away_down = (terms.advantages < 0) & (ratio < 1.0)
    drop = (divergence >= terms.clip_high) & (away_up | away_down)
    loss = torch.where(drop, torch.zeros_like(ratio), -terms.advantages * ratio)
    stats = {
        "ratio": ratio.detach(),
        "clipped_low": (drop & away_down).float(),
        "clipped_high": (drop & away_up).float(),
    }
    return loss, stats
