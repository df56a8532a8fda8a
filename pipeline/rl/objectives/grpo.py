"""GRPO: the clipped policy gradient on single denoising steps."""

from __future__ import annotations

from pipeline.rl.objectives.base import register
from pipeline.rl.objectives.transitions import ClippedObjective


@register("grpo")
class GRPO(ClippedObjective):
    """GRPO on denoising steps (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818)."""
