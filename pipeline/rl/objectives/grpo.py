"""GRPO: the clipped policy gradient on single denoising steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.rl.objectives.base import register
from pipeline.rl.objectives.transitions import ClippedObjective, TransitionTerms

if TYPE_CHECKING:
    import torch


@register("grpo")
class GRPO(ClippedObjective):
    """GRPO on denoising steps (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818)."""

    def log_ratio(self, terms: TransitionTerms) -> torch.Tensor:
        return terms.log_prob - terms.old_log_prob
