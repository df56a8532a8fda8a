"""DiffusionNFT: learns from good takes and away from bad ones, by the flow-matching loss of two mixed policies."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.config.sections.base import DecayRate, NonNegative, Positive
from pipeline.rl.objectives.base import Requirements, register
from pipeline.rl.objectives.denoising import DenoisingObjective, DenoisingTerms

if TYPE_CHECKING:
    import torch


@register("nft")
class DiffusionNFT(DenoisingObjective):
    """DiffusionNFT (arXiv 2509.16117): r l(v+) + (1 - r) l(v-), v+- = v_old +- mix (v - v_old).

    r in [0, 1] is how good a take is: A / (2 max_advantage) + 1/2. l is the squared error of the predicted x0, divided
    by its own mean absolute size. The old policy, which also draws the takes, follows the trained one as an average
    over steps. Where both are equal, the gradient is that of A l.
    """

    mix: Positive = Field(1.0, description="How far v+ and v- lie from the old policy, in units of v - v_old.")
    max_advantage: Positive = Field(5.0, description="Advantage of a take that counts as wholly good (or bad).")
    old_decay_ramp: NonNegative = Field(0.001, description="The old policy's decay grows by this much per step,")
    old_decay_max: DecayRate = Field(0.5, description="up to this. (0: takes are drawn by the trained policy.)")

    @property
    def requirements(self) -> Requirements:
        return replace(super().requirements, old_policy=True)

    def old_decay(self, step: int) -> float:
        return min(self.old_decay_ramp * step, self.old_decay_max)

    def policy_loss(self, terms: DenoisingTerms) -> torch.Tensor:
        assert terms.old_output is not None  # required
        moved = self.mix * (terms.output - terms.old_output)
        goodness = (terms.advantages / (2.0 * self.max_advantage) + 0.5).clamp(0.0, 1.0)
        better = self._error(terms, terms.old_output + moved)
        worse = self._error(terms, terms.old_output - moved)
        return self.max_advantage / self.mix * (goodness * better + (1.0 - goodness) * worse)

    @staticmethod
    def _error(terms: DenoisingTerms, output: torch.Tensor) -> torch.Tensor:
        """mean_D |x0' - x0|^2 / w [b], w = mean_D |x0' - x0| without gradients."""
        error = ((output - terms.target) * terms.clean_error_scale).flatten(1)
        size = error.detach().abs().double().mean(1).clamp(min=1e-5).float()
        return error.pow(2).mean(1) / size
