"""What an objective that learns through a reward's gradient makes of the reward: options that several objectives
share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipeline.rl.objectives.base import Objective

if TYPE_CHECKING:
    import torch


class WithRewardShape(Objective):
    """A reward's loss; `rewards.*.weight` is its weight in the sum."""

    shape: Literal["linear", "hinge", "distance"] = Field(
        "linear", description="Of a reward r: -r; max(0, target - r); or |target - r|."
    )
    target: float | None = Field(None, description="Of hinge (ReFL: 2, with ImageReward) and distance.")

    @model_validator(mode="after")
    def _target_fits(self) -> WithRewardShape:
        if self.shape != "linear" and self.target is None:
            raise ValueError(f"target: {self.shape} needs one: the reward at which nothing is left to learn")
        if self.shape == "linear" and self.target is not None:
            raise ValueError(f"target: found {self.target:g}, which linear has no use for; leave it out, or set hinge")
        return self

    def shaped(self, reward: torch.Tensor) -> torch.Tensor:
        """The loss of a reward [b] -> [b]; 0 where the reward does not apply to the take's prompt (NaN)."""
        if self.shape == "linear":
            loss = -reward
        else:
            assert self.target is not None  # checked
            loss = (self.target - reward).clamp(min=0.0) if self.shape == "hinge" else (reward - self.target).abs()
        return where_it_applies(loss)


def weighted(weights: Mapping[str, float], values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weighted sum of each reward's values [b]."""
    first, *rest = (weights[name] * value for name, value in values.items())
    return sum(rest, first)


def where_it_applies(values: torch.Tensor) -> torch.Tensor:
    """0 in place of NaN, which a reward gives where it does not apply to the prompt."""
    return values.where(~values.isnan(), values.new_zeros(()))
