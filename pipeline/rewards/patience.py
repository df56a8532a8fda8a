"""Waiting for a service that is away: it is tried again, ever more seldom, for a bounded time.

A service that is away says nothing about the takes that were to be scored, so such a failure is not an attempt of
theirs. The bound covers the outage, not each group: once it is over, whatever comes next fails at once.
"""

from __future__ import annotations

import logging
import time

from pipeline.core.errors import one_line

MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 30.0
SAY_EVERY_S = 30.0
PATIENCE_S = 1800.0  # where no config says (faults.call_timeout_s)
log = logging.getLogger("rushes.rewards")


class Patience:
    """The outages of one service. `name`: who waits, for the log; `bound_s`: the longest outage that is waited for;
    `bound`: what sets it, for the log."""

    def __init__(self, name: str, bound_s: float, bound: str) -> None:
        self.name, self.bound_s, self.bound = name, bound_s, bound
        self._since: float | None = None  # when the outage began
        self._said = 0.0

    @property
    def away_s(self) -> float:
        """Seconds since the service was first found away; 0 while it answers."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def pause_s(self, error: BaseException) -> float | None:
        """The service is away. Returns the seconds to wait before it is tried again, or None once `bound_s` is over."""
        if self.bound_s <= 0:
            return None
        now = time.monotonic()
        first = self._since is None
        if self._since is None:
            self._since = now
        away = now - self._since
        if away >= self.bound_s:
            return None
        pause = min(max(MIN_PAUSE_S, away / 2), MAX_PAUSE_S, max(0.05, self.bound_s - away))
        if first or now - self._said >= SAY_EVERY_S:
            self._said = now
            log.warning(
                "%s is away: %s; waiting for it since %.0f s, at most %g s (%s)",
                self.name,
                one_line(error, 300),
                away,
                self.bound_s,
                self.bound,
            )
        return pause

    def answered(self) -> None:
        """The service answers."""
        if self._since is not None:
            log.warning("%s is back after %.0f s", self.name, self.away_s)
            self._since = None
