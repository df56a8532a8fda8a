"""What searches have in common that tell particles apart by the noise of the sampler's steps."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline.config.sections.base import Natural, NonNegative, Positive
from pipeline.search.base import Search


class NoisySearch(Search):
    """Its takes are drawn by a stochastic sampler, `sampler.kind`."""

    draws_noise: ClassVar[bool] = True

    noise_level: Positive | None = Field(
        None, description="Noise of the stochastic sampler; null: sampler.noise_level."
    )
    at: list[Natural] | None = Field(
        None, description="Levels (sampler steps) at which it chooses; null: all that noise is drawn at."
    )
    strength: NonNegative = Field(
        10.0, description="Lambda: takes are drawn from p(x) exp(lambda reward(x)); 0: plain sampling."
    )
    pick: Literal["best", "drawn"] = Field(
        "best", description="The take that is kept: the one with the best score, or one drawn from the tilted model."
    )
