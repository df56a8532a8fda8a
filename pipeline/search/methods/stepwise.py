"""Step-wise verification after PARM (arXiv 2501.13926): a judge looks at what takes will become, and prunes.

Takes are compared at a few levels by the reward of the model's x0 prediction; the better share goes on. The sampler may
be deterministic: nothing is resampled, only dropped, so early judgements buy more first takes for the same calls.
"""

from __future__ import annotations

import math

from pydantic import Field

from pipeline.config.sections.base import Natural, Share
from pipeline.core.errors import ConfigError
from pipeline.search.base import START, Advance, Found, Particle, Score, Search, Searching, Task, register


@register("stepwise")
class StepwiseVerification(Search):
    """Step-wise verification: many takes are begun, and at each level the better share goes on."""

    at: list[Natural] | None = Field(
        None, description="Levels (sampler steps) at which takes are judged; null: a third and two thirds of the way."
    )
    keep: Share = Field(0.5, description="Share of the takes that go on after a judgement.")

    def check(self, task: Task) -> None:
        self._judged(task)
        if self.begun(task) < 1:  # unreachable while one plain take fits; kept for the sentence's sake
            raise ConfigError("search stepwise: the budget does not pay for one take; raise passes")

    def _judged(self, task: Task) -> list[int]:
        if self.at is None:
            return sorted({task.steps // 3, 2 * task.steps // 3} - {0}) or [0]
        return self.levels(self.at, task, first=0)

    def begun(self, task: Task) -> int:
        """How many takes the budget lets begin."""
        count = self.passes
        while self._cost(count + 1, task) <= self.passes * task.steps:
            count += 1
        return count

    def _cost(self, begun: int, task: Task) -> int:
        total, level, alive = 0, START, begun
        for to in self._judged(task):
            total += alive * task.cost(level, to)
            alive, level = self._survivors(alive), to
        return total + alive * task.cost(level, task.steps)

    def _survivors(self, alive: int) -> int:
        return max(1, math.ceil(self.keep * alive))

    def search(self, task: Task) -> Searching:
        particles: list[Particle] = [task.new_particle() for _ in range(self.begun(task))]
        for level in self._judged(task):
            particles = yield Advance(particles, level)
            scores = yield Score(particles)
            kept = sorted((-scores).argsort(kind="stable")[: self._survivors(len(particles))].tolist())
            particles = [particles[row] for row in kept]
        takes = yield Advance(particles, task.steps)
        scores = yield Score(takes)
        return Found(takes[int(scores.argmax())], float(scores.max()))
