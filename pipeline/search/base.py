"""What a search is: a generator that asks for particles to be advanced and scored, and returns the take that it found.

A search never calls a model. It yields requests, so that those of many prompts are answered in one call
(`pipeline.search.run`), and the same code runs on an analytic model in the tests:

    particles = yield Advance([task.new_particle() for _ in range(8)], task.steps)
    scores = yield Score(particles)

Levels: at level j, 0 <= j < steps, a particle has x_j and the model's output for it, so its x0 prediction costs no
further call. At level `steps` it is finished. At level -1 only its seed is drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from pipeline.config.parts import Part
from pipeline.config.sections.base import Count
from pipeline.core.errors import ConfigError
from pipeline.core.registry import Registry
from pipeline.core.types import Lineage

START = -1  # level of a particle whose seed alone is drawn


@dataclass(frozen=True, slots=True, eq=False)
class Particle:
    """A take on its way from noise to picture. Its noise is a function of its lineage alone."""

    level: int
    lineage: Lineage  # seeds of its noise; the first is also that of its initial noise
    node: int = -1  # its row in the search's `Trace`; -1: none yet
    x: Any = None  # tensor [...], x_t
    output: Any = None  # tensor [...], the model's output for x
    frames: np.ndarray | None = None  # uint8 [F, H, W, 3], of a finished one

    def fork(self, seed: int) -> Particle:
        """The same state, which draws other noise from here on."""
        kept = tuple(entry for entry in self.lineage if entry[0] < max(self.level, 0))
        return replace(self, lineage=(*kept, (max(self.level, 0), seed)))

    def at(self, x: Any) -> Particle:
        """With another state of the same level, which the model has not answered yet."""
        return replace(self, x=x, output=None)


class Advance(NamedTuple):
    """Takes particles, all of one level, on to another one. The answer: a list of particles."""

    particles: Sequence[Particle]
    to: int


class Score(NamedTuple):
    """Decodes and scores particles: finished ones, or what the model predicts of them. The answer: float64 [n]."""

    particles: Sequence[Particle]


class Differentiate(NamedTuple):
    """Takes particles of level 0 to their end without noise. The answer: for each the finished particle, and the
    gradient [...] of its score with respect to the state that it began at."""

    particles: Sequence[Particle]


Request = Advance | Score | Differentiate
Searching = Generator[Request, Any, "Found"]  # sends list[Particle], float64 [n] or list[(Particle, tensor)]


@dataclass(frozen=True, slots=True)
class Found:
    """What a search returns."""

    best: Particle  # finished
    score: float


@dataclass(slots=True)
class Node:
    """A row of the search's record: a particle as it was at one level."""

    parent: int  # row; -1: none
    level: int
    seed: int  # of the noise that was drawn last
    calls: int  # denoiser calls of the whole search, up to and with this one
    score: float | None = None  # of what the model predicts here, or of the finished take
    picture: np.ndarray | None = None  # uint8 [H, W, 3], what was scored; a clip's middle frame


@dataclass(slots=True)
class Trace:
    """The ancestry, scores and costs of a search, in the order in which they came about."""

    nodes: list[Node] = field(default_factory=list)
    calls: int = 0  # of the denoiser; both branches of guidance count as one

    def best_so_far(self, steps: int) -> list[tuple[int, float]]:
        """(calls, best score of the finished takes) at each finished take."""
        best, curve = -np.inf, []
        for node in self.nodes:
            if node.level == steps and node.score is not None:
                best = max(best, node.score)
                curve.append((node.calls, best))
        return curve


@dataclass(slots=True)
class Task:
    """One take that is searched for."""

    steps: int  # of the sampler
    noisy: tuple[int, ...]  # the steps that draw noise
    seed: int  # of the plain take, which the first particle of every search begins like
    trace: Trace = field(default_factory=Trace)
    _drawn: int = 0

    def new_seed(self) -> int:
        """The plain take's, then others that follow from it."""
        number, self._drawn = self._drawn, self._drawn + 1
        return self.seed if number == 0 else int(self.rng(number).integers(2**62))

    def new_particle(self) -> Particle:
        seed = self.new_seed()
        return Particle(level=START, lineage=((0, seed),))

    def rng(self, number: int = 0) -> np.random.Generator:
        """Of a search's choices (0), apart from all noise."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, number]))

    @property
    def last_noisy(self) -> int:
        """The last level from which two particles can go on differently; -1: there is none."""
        return max(self.noisy, default=-1)

    def cost(self, level: int, to: int) -> int:
        """Denoiser calls of a particle from one level to another."""
        return min(to, self.steps - 1) - level


class Search(Part, ABC):
    """Its fields are its options. `draws_noise`: it needs a stochastic sampler; `looks_ahead`: it stops between levels,
    so the pipeline has to go on from a given sample; `gradients`: the rewards that steer have gradients, and are
    computed in this process."""

    draws_noise: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = True
    gradients: ClassVar[bool] = False

    passes: Count = Field(
        8, description="What a take may cost: denoiser calls, as a multiple of those of one plain take."
    )

    @property
    def particles(self) -> int:
        """How many particles of a take are advanced at once, at most."""
        return self.passes

    @abstractmethod
    def search(self, task: Task) -> Searching:
        """Searches for one take; see the module docstring."""

    def check(self, task: Task) -> None:
        """Rules that concern the sampler's steps. Raises `ConfigError` naming the option and the fix."""
        if self.draws_noise and not task.noisy:
            raise ConfigError(
                f"search {self.name}: none of the {task.steps} sampler steps can draw noise, as they end too close to "
                "noise level 0, so equal particles stay equal; use more steps, or best-of-n"
            )

    def levels(self, at: Sequence[int] | None, task: Task, first: int) -> list[int]:
        """The levels that an option `at` names; by default all from `first` on that noise is drawn at.

        Raises `ConfigError` where one is outside of these, or they do not rise.
        """
        last = task.last_noisy if self.draws_noise else task.steps - 1
        if at is None:
            return list(range(first, last + 1))
        if list(at) != sorted(set(at)) or not at or at[0] < first or at[-1] > last:
            raise ConfigError(
                f"search {self.name}: at: found {list(at)}; expected rising levels from {first} to {last}, of "
                f"{task.steps} sampler steps" + (", the last that draws noise" if self.draws_noise else "")
            )
        return list(at)


def steering_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Of the rewards that steer. Raises `ConfigError` where there are none."""
    steering = {name: weight for name, weight in weights.items() if weight != 0.0}
    if not steering:
        raise ConfigError("search: no reward has a weight, so nothing tells a good take; set rewards.<name>.weight")
    return steering


SEARCHES: Registry[type[Search]] = Registry("search", "pipeline.search.methods")
register = SEARCHES.register
