"""A tracker that may fail, hang or be away without holding up the run."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from pipeline.core.errors import one_line
from pipeline.core.types import Media, TakeCaption

MAX_WAITING = 64  # records that a slow tracker may be behind; further ones are left out of it
CLOSE_S = 15.0  # seconds that its last records and its end may take
log = logging.getLogger("rushes.tracking")


class Tracker(Protocol):
    """See `pipeline.runs.tracking.Tracker`."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_media(self, step: int, tag: str, media: Media, captions: Sequence[TakeCaption] = ()) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class OptionalTracker:
    """Hands records to a tracker in a thread of its own, in order. Its first failure is one warning by name; later
    records are tried all the same, since a server may come back. `missing` says what it did not get."""

    def __init__(self, name: str, build: Callable[[], Tracker]) -> None:
        self.name, self._build = name, build
        self._queue: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MAX_WAITING)
        self._lock = threading.Lock()
        self._given = self._written = 0
        self._reason: str | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Never waits, never raises."""
        self._give(lambda tracker: tracker.log(step, metrics))

    def log_media(self, step: int, tag: str, media: Media, captions: Sequence[TakeCaption] = ()) -> None:
        """Never waits, never raises."""
        self._give(lambda tracker: tracker.log_media(step, tag, media, captions))

    def rewind(self, step: int) -> None:
        """Never waits, never raises."""
        self._give(lambda tracker: tracker.rewind(step))

    def close(self, within_s: float | None = None) -> None:
        """Waits for what was given, at most `within_s` seconds (`CLOSE_S`), and leaves the rest behind."""
        deadline = time.monotonic() + (CLOSE_S if within_s is None else within_s)
        try:
            self._queue.put(None, timeout=max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._failed(f"did not answer in {CLOSE_S if within_s is None else within_s:g} s")

    def missing(self) -> str | None:
        """One line for the end of the run; None when it got everything."""
        with self._lock:
            if self._reason is None:
                return None
            lost = self._given - self._written
            return f"tracker {self.name}: {lost} of {self._given} records are missing ({self._reason})"

    def _give(self, record: Callable[[Tracker], None]) -> None:
        with self._lock:
            self._given += 1
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._failed(f"is more than {MAX_WAITING} records behind")

    def _failed(self, reason: str) -> None:
        with self._lock:
            first, self._reason = self._reason is None, self._reason or reason
        if first:
            log.warning("tracker %s failed: %s; the run continues, all metrics are in metrics.jsonl", self.name, reason)

    def _work(self) -> None:
        tracker: Tracker | None = None
        while True:
            record = self._queue.get()
            try:
                if tracker is None:
                    tracker = self._build()
                if record is None:
                    tracker.close()
                    return
                record(tracker)
            except BaseException as error:  # each backend raises its own kinds; SystemExit must not end it in silence
                self._failed(f"{type(error).__name__}: {one_line(error, 300)}")
                if record is None:
                    return
            else:
                with self._lock:
                    self._written += 1
