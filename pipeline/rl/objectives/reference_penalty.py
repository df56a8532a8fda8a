"""The penalty that holds a policy to the one it started from: two options that several objectives share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pipeline.config.sections.base import Count, NonNegative
from pipeline.rl.objectives.base import Objective
from pipeline.rl.objectives.micro_batch import MicroBatch

if TYPE_CHECKING:
    import torch


class WithReference(Objective):
    """Adds `kl_beta` times a distance from the starting policy to the loss."""

    kl_beta: NonNegative = Field(0.0, description="Weight of the distance from the starting policy (0: none).")
    kl_every: Count = Field(
        1,
        description="Measure it at every n-th trained noise level, scaled by n and rotating across groups: unbiased, "
        "for 1/n of the reference's forward passes.",
    )

    @model_validator(mode="after")
    def _thinned_out_distance_has_a_weight(self) -> WithReference:
        if self.kl_every > 1 and self.kl_beta == 0:
            raise ValueError(
                f"kl_every: {self.kl_every} thins out a KL that has no weight; set objective.kl_beta above 0, or leave "
                "kl_every out"
            )
        return self

    @property
    def reference_every(self) -> int:
        return self.kl_every if self.kl_beta else 0

    @property
    def terms(self) -> dict[str, float]:
        return {"policy_loss": 1.0, **({"kl": self.kl_beta} if self.kl_beta else {})}

    def with_reference(
        self, policy_loss: torch.Tensor, micro: MicroBatch, distance: Callable[[slice], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The total loss [b] and its logged terms. `distance(rows)`: float32 [len(rows)], with gradients."""
        logs = {"policy_loss": policy_loss.detach()}
        if not self.kl_beta:
            return policy_loss, logs
        kl = policy_loss.new_zeros(policy_loss.shape)
        for rows in micro.rows_at_every(self.kl_every):
            kl[rows] = self.kl_every * distance(rows)
        return policy_loss + self.kl_beta * kl, {**logs, "kl": kl.detach()}
