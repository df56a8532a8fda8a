"""Runs many searches at once: their requests are joined, so that particles of many prompts share a pipeline call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.search.base import (
    Advance,
    Differentiate,
    Found,
    Node,
    Particle,
    Request,
    Search,
    Searching,
    Task,
    Trace,
)
from pipeline.search.walk import Walk

Progress = Callable[[int, float], None]  # (denoiser calls, mean over the searches of the best score so far)


class _Running:
    """A search that waits for an answer."""

    def __init__(self, owner: int, search: Search, task: Task) -> None:
        self.owner, self.task, self.best = owner, task, -np.inf
        self._generator: Searching = search.search(task)
        self.request: Request = next(self._generator)
        self.found: Found | None = None

    def answer(self, answer: Any) -> None:
        """`answer`: what the request asks for."""
        try:
            self.request = self._generator.send(answer)
        except StopIteration as end:
            self.found = end.value

    @property
    def turn(self) -> tuple[int, int, int]:
        """Requests with the lowest are answered together. Particles that are behind come first, so that searches which
        are not in step meet again."""
        if isinstance(self.request, Advance):
            return (0, self.request.particles[0].level, self.request.to)
        return (1 if isinstance(self.request, Differentiate) else 2, 0, 0)


def run_searches(
    search: Search, tasks: Sequence[Task], walk: Walk, pictures: bool = False, progress: Progress | None = None
) -> list[Found]:
    """The take that each search finds; the searches' traces are filled in. `pictures`: also with what was scored.

    The same tasks give the same takes, whatever the machine does meanwhile.
    """
    running = [_Running(owner, search, task) for owner, task in enumerate(tasks)]
    while waiting := [one for one in running if one.found is None]:
        turn = min(one.turn for one in waiting)
        _answer([one for one in waiting if one.turn == turn], walk, pictures)
        if progress is not None:
            best = [one.best for one in running if one.best > -np.inf]
            progress(sum(task.trace.calls for task in tasks), float(np.mean(best)) if best else -np.inf)
    return [one.found for one in running if one.found is not None]


def _answer(together: list[_Running], walk: Walk, pictures: bool) -> None:
    """Answers requests that are alike."""
    particles = [particle for one in together for particle in one.request.particles]
    owners = [one.owner for one in together for _ in one.request.particles]
    starts = np.cumsum([0, *[len(one.request.particles) for one in together]])
    rows = [slice(start, stop) for start, stop in zip(starts[:-1], starts[1:], strict=True)]
    request = together[0].request
    if isinstance(request, Advance):
        advanced = walk.advance(particles, owners, request.to)
        for one, mine in zip(together, rows, strict=True):
            one.answer(_noted(one.task, advanced[mine]))
        return
    if isinstance(request, Differentiate):
        finished = walk.differentiate(particles, owners)
        for one, mine in zip(together, rows, strict=True):
            takes, slopes = zip(*finished[mine], strict=True)
            one.answer(list(zip(_noted(one.task, takes, calls=one.task.steps), slopes, strict=True)))
        return
    scores, scored = walk.score(particles, owners)
    for one, mine in zip(together, rows, strict=True):
        for particle, score, frames in zip(particles[mine], scores[mine], scored[mine], strict=True):
            node = one.task.trace.nodes[particle.node]
            node.score = float(score)
            if pictures:
                node.picture = frames[len(frames) // 2]
            if particle.level == one.task.steps:
                one.best = max(one.best, float(score))
        one.answer(np.asarray(scores[mine], np.float64))


def _noted(task: Task, advanced: Sequence[Particle], calls: int | None = None) -> list[Particle]:
    """The particles with their rows in the trace, whose denoiser calls are counted. `calls`: of each, where these do
    not follow from its levels."""
    trace: Trace = task.trace
    noted = []
    for particle in advanced:
        level = trace.nodes[particle.node].level if particle.node >= 0 else -1
        trace.calls += task.cost(level, particle.level) if calls is None else calls
        node = Node(parent=particle.node, level=particle.level, seed=particle.lineage[-1][1], calls=trace.calls)
        trace.nodes.append(node)
        noted.append(replace(particle, node=len(trace.nodes) - 1))
    return noted
