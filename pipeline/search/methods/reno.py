"""ReNO (arXiv 2406.04312): the initial noise is improved by the gradient of the rewards, through the whole sampler.

Every iteration draws the take of the present noise, so the best one so far is always there. One-step generators were
meant; with more steps each denoiser call is computed again in the backward pass, so an iteration costs two passes
forward and one back where a plain take costs one.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from pipeline.config.sections.base import NonNegative, Positive
from pipeline.search.base import Advance, Differentiate, Found, Particle, Score, Search, Searching, Task, register


@register("reno")
class NoiseOptimisation(Search):
    """ReNO: as many iterations of gradient ascent on the initial noise as passes; the best take of all is kept."""

    gradients: ClassVar[bool] = True

    rate: Positive = Field(5.0, description="Step size of SGD with Nesterov momentum.")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="Its momentum.")
    max_norm: Positive = Field(0.1, description="The gradient is shortened to this norm.")
    norm_weight: NonNegative = Field(
        0.01, description="Weight of the norm's negative log-density: it keeps noise as long as Gaussian noise is."
    )

    @property
    def particles(self) -> int:
        return 1

    def search(self, task: Task) -> Searching:
        (begun,) = yield Advance([task.new_particle()], 0)
        x = begun.x
        own_length = _norm(x)
        velocity = 0.0 * x
        best: tuple[float, Particle] | None = None
        for _ in range(self.passes):
            ((take, slope),) = yield Differentiate([begun.at(x)])
            (score,) = yield Score([take])
            if best is None or score > best[0]:
                best = (float(score), take)
            ascent = slope - self.norm_weight * norm_slope(x, own_length)
            ascent = ascent * min(1.0, self.max_norm / max(_norm(ascent), 1e-12))
            velocity = self.momentum * velocity + ascent
            x = x + self.rate * (ascent + self.momentum * velocity)
        assert best is not None  # there is at least one pass
        return Found(best[1], best[0])


def norm_slope(x: Any, own_length: float) -> Any:
    """Gradient of |z|^2 / 2 - (d - 1) log |z|, the negative log-density of the norm of d Gaussian numbers, with respect
    to z = x sqrt(d - 1) / own_length: it is 0 where x is as long as the noise that it began as.

    z and x differ where a pipeline scales its initial noise.
    """
    numbers = x.numel()
    length = _norm(x)
    scale = (numbers - 1) ** 0.5 / own_length
    return scale * x * (1.0 - (own_length / length) ** 2)


def _norm(x: Any) -> float:
    return float(x.norm())
