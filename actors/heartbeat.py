"""Signs of life of an actor that is busy: a call that takes long and a process that is stopped look the same otherwise.

A thread of the actor counts up in the cluster's key-value store; whoever waits for the actor watches the count. It
beats while the actor computes, and not while its process is stopped or its node hangs.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable

import ray

BEAT_S = 5.0
_NAMESPACE = "rushes"


def start_heartbeat() -> None:
    """Begins to beat for the actor that this process is."""
    from ray.experimental import internal_kv

    key = _key(ray.get_runtime_context().get_actor_id())

    def beat() -> None:
        for count in itertools.count():
            with contextlib.suppress(Exception):  # the cluster's head is away: the next beat may come through
                internal_kv._internal_kv_put(key, str(count), namespace=_NAMESPACE)
            time.sleep(BEAT_S)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def read_beat(actor_id: str) -> str | None:
    """The last count; None before the first. Waits for the cluster's head."""
    from ray.experimental import internal_kv

    value = internal_kv._internal_kv_get(_key(actor_id), namespace=_NAMESPACE)
    return value.decode() if value is not None else None


class Pulse:
    """Seconds since an actor's last new beat, as this process has seen them: no two clocks are compared."""

    def __init__(self, read: Callable[[str], str | None] = read_beat, clock: Callable[[], float] = time.monotonic):
        self._read, self._clock = read, clock
        self._seen: dict[str, tuple[str, float]] = {}  # by actor id: (count, when it was new)

    def silent_s(self, actor_id: str) -> float:
        """0 before the first beat, and while nobody can be asked (the cluster's head is away)."""
        try:
            beat = self._read(actor_id)
        except Exception:  # Ray raises many kinds; all of them are about the head, not about the actor
            self._seen.pop(actor_id, None)
            return 0.0
        if beat is None:
            return 0.0
        now = self._clock()
        seen = self._seen.get(actor_id)
        if seen is None or seen[0] != beat:
            self._seen[actor_id] = (beat, now)
            return 0.0
        return now - seen[1]


def _key(actor_id: str) -> str:
    return f"heartbeat/{actor_id}"
