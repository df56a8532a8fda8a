"""DGPO: the preference of a group's better half over its worse half, in one sigmoid for the whole group."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.config.sections.base import Positive
from pipeline.rl.objectives.base import Requirements, register
from pipeline.rl.objectives.denoising import DenoisingObjective, DenoisingTerms

if TYPE_CHECKING:
    import torch


@register("dgpo")
class DGPO(DenoisingObjective):
    """DGPO (arXiv 2510.08425): W A M per take, M = mean_D |output - target|^2,
    W = sigmoid(beta mean_i A_i (M_i - M_ref,i)).

    The gradient is that of -log sigmoid(-beta mean_i A_i (M_i - M_ref,i)) / beta. W, one for a group at a noise level,
    lies near 1/2 at the start and fades where the group's preference has been learned.
    """

    uses_reference = True

    beta: Positive = Field(100.0, description="How soon a group whose preference has been learned counts less.")

    @property
    def requirements(self) -> Requirements:
        return replace(super().requirements, whole_group=True, joins_levels=False, max_updates=1, max_staleness=0)

    def policy_loss(self, terms: DenoisingTerms) -> torch.Tensor:
        assert terms.reference_output is not None  # required
        error = (terms.output - terms.target).pow(2).flatten(1).mean(1)
        reference_error = (terms.reference_output - terms.target).pow(2).flatten(1).mean(1)
        preference = (terms.advantages * (error.detach() - reference_error)).mean()
        return (self.beta * preference).sigmoid() * terms.advantages * error
