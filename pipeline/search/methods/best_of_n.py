"""Best of N: as many plain takes as the budget pays for, of which the best is kept."""

from __future__ import annotations

from typing import ClassVar

from pipeline.search.base import Advance, Found, Score, Search, Searching, Task, register


@register("best-of-n")
class BestOfN(Search):
    """The best of N takes (N: passes) of the deterministic sampler; the first is the plain take."""

    looks_ahead: ClassVar[bool] = False

    def search(self, task: Task) -> Searching:
        takes = yield Advance([task.new_particle() for _ in range(self.passes)], task.steps)
        scores = yield Score(takes)
        return Found(takes[int(scores.argmax())], float(scores.max()))
