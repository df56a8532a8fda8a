"""How large a pool should be: a pure policy on what its queue and its workers did lately. No Ray, no clock.

Grow when work waits longer than a piece of it takes: one worker per waiting piece, at most doubling, because each new
worker has a model to load. Shrink to the most that were busy at once during a whole window, which spans at least two
optimisation steps: workers that rest while the learner learns are not spare. Never past the limits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.config.resources import WorkerRange

PATIENCE_S = 5.0  # work that waits for less than this is no reason to load another model
WINDOW_S = 60.0  # the shortest time after which a worker counts as spare


@dataclass(frozen=True, slots=True)
class Load:
    """What a pool does at one moment."""

    size: int  # workers it has, those that still start or wait for a node included; those that leave are not
    starting: int  # of these, not ready yet
    busy: int
    depth: int  # items in the queue
    waited_s: float  # by the oldest of them
    item_s: float  # seconds a worker takes for one item, lately; 0: none has been finished yet
    peak: int  # most items in hand or waiting at one moment of the window
    watched_s: float  # how much of the window has been seen since the size last changed
    window_s: float  # see `History.window_s`


@dataclass(frozen=True, slots=True)
class Decision:
    size: int
    reason: str  # for the log; empty when nothing changes


def decide(load: Load, limits: WorkerRange) -> Decision:
    """The size the pool should have now, and why."""
    if load.size < limits.min:
        return Decision(limits.min, f"at least {limits.min} are wanted")
    if load.size > limits.max:
        return Decision(limits.max, f"at most {limits.max} are wanted")
    patience = max(PATIENCE_S, load.item_s)
    if load.depth and load.waited_s > patience and not load.starting and load.size < limits.max:
        size = min(limits.max, load.size + min(load.depth, max(1, load.size)))
        return Decision(
            size,
            f"{load.depth} group{'s' * (load.depth > 1)} waiting, the oldest for {load.waited_s:.0f} s "
            f"(a group takes {load.item_s:.0f} s)",
        )
    wanted = max(limits.min, load.peak)
    if load.size > wanted and load.watched_s >= load.window_s:
        return Decision(wanted, f"no more than {load.peak} had work at once in the last {load.window_s:.0f} s")
    return Decision(load.size, "")


@dataclass
class History:
    """What one pool did in the last window. Times are seconds of any clock that only goes forward."""

    step_s: float = 0.0  # longest optimisation step seen lately
    _samples: deque[tuple[float, int]] = field(default_factory=deque)
    _items: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    @property
    def window_s(self) -> float:
        return max(WINDOW_S, 2 * self.step_s)

    def step(self, seconds: float) -> None:
        """An optimisation step took this long; long ones are forgotten slowly."""
        self.step_s = max(seconds, 0.8 * self.step_s)

    def finished(self, seconds: float) -> None:
        """A worker took this long for one item."""
        self._items.append(seconds)

    def resized(self) -> None:
        """What was seen of another size says nothing about spare workers of this one."""
        self._samples.clear()

    def load(self, now: float, *, size: int, starting: int, busy: int, depth: int, waited_s: float) -> Load:
        """Adds a sample and returns what `decide` needs."""
        self._samples.append((now, busy + depth))
        while len(self._samples) > 1 and self._samples[1][0] <= now - self.window_s:  # one is kept from before it
            self._samples.popleft()
        return Load(
            size=size,
            starting=starting,
            busy=busy,
            depth=depth,
            waited_s=waited_s,
            item_s=_mean(self._items),
            peak=max(count for _, count in self._samples),
            watched_s=now - self._samples[0][0],
            window_s=self.window_s,
        )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
