"""How large a pool should be: a pure function of what its queue and its workers did lately. No Ray, no clock.

Grow when a request waits longer than a call takes: by one worker per waiting request, at most doubling, because each
new worker has a model to load. Shrink to the most workers that were busy at once during a whole window, which spans at
least two optimisation steps: workers that are idle while the learner trains are not spare. Never past the limits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.config.resources import WorkerRange

PATIENCE_S = 5.0  # a request that waits for less than this is no reason to load another model
WINDOW_S = 60.0  # the shortest time after which a worker counts as spare


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a pool at one moment."""

    size: int  # workers, including those that start or wait for a node, without those that are being removed
    starting: int  # of these, not ready yet
    busy: int
    depth: int  # requests that wait
    waited_s: float  # by the oldest of them
    call_s: float  # mean of a worker's last calls; 0: there has been none
    peak: int  # most requests that were worked on or waited at one moment of the window
    watched_s: float  # how much of the window has passed since the size last changed
    window_s: float  # see `History.window_s`


@dataclass(frozen=True, slots=True)
class Decision:
    size: int
    reason: str  # for the log; empty when nothing changes


def decide(load: Load, limits: WorkerRange) -> Decision:
    """The size the pool should have now, and why."""
    if load.size < limits.min:
        return Decision(limits.min, f"at least {limits.min} are configured")
    if load.size > limits.max:
        return Decision(limits.max, f"at most {limits.max} are configured")
    patience = max(PATIENCE_S, load.call_s)
    if load.depth and load.waited_s > patience and not load.starting and load.size < limits.max:
        size = min(limits.max, load.size + min(load.depth, max(1, load.size)))
        return Decision(
            size,
            f"{load.depth} request{'s' * (load.depth > 1)} waiting, the oldest for {load.waited_s:.0f} s "
            f"(a call takes {load.call_s:.0f} s)",
        )
    needed = max(limits.min, load.peak)
    if load.size > needed and load.watched_s >= load.window_s:
        return Decision(needed, f"no more than {load.peak} had work at once in the last {load.window_s:.0f} s")
    return Decision(load.size, "")


@dataclass
class History:
    """What one pool did in the last window. Times are seconds of any monotonic clock."""

    step_s: float = 0.0  # longest optimisation step seen lately
    _samples: deque[tuple[float, int]] = field(default_factory=deque)
    _call_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    @property
    def window_s(self) -> float:
        return max(WINDOW_S, 2 * self.step_s)

    def step(self, seconds: float) -> None:
        """Notes the duration of an optimisation step; long ones are forgotten slowly."""
        self.step_s = max(seconds, 0.8 * self.step_s)

    def finished(self, seconds: float) -> None:
        """Notes the duration of a worker's call."""
        self._call_seconds.append(seconds)

    def resized(self) -> None:
        """Forgets the window: the load of another size says nothing about spare workers of this one."""
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
            call_s=_mean(self._call_seconds),
            peak=max(count for _, count in self._samples),
            watched_s=now - self._samples[0][0],
            window_s=self.window_s,
        )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
