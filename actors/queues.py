"""Bounded queues between the roles. They live in the controller and hold references and small metadata only.

A full queue blocks its producer: that is the back-pressure. There are no end markers; a consumer is cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class BoundedQueue(Generic[Item]):
    """First in, first out, except that a consumer may pass over items it should not take (`accept`)."""

    def __init__(self, name: str, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"queue {name}: capacity {capacity} must be at least 1")
        self.name, self.capacity = name, capacity
        self._items: list[tuple[float, Item]] = []
        self._changed = asyncio.Condition()
        self.max_depth = 0
        self._waits: list[float] = []  # seconds that items spent in the queue since the last `drain_stats`
        self._blocked = 0.0  # seconds that producers waited for room

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: Item) -> None:
        """Waits while the queue is full."""
        asked = time.monotonic()
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._items) < self.capacity)
            self._blocked += time.monotonic() - asked
            self._items.append((time.monotonic(), item))
            self.max_depth = max(self.max_depth, len(self._items))
            self._changed.notify_all()

    async def put_back(self, item: Item) -> None:
        """A retried item goes to the front, room or not: its consumer cannot wait for itself to make room."""
        async with self._changed:
            self._items.insert(0, (time.monotonic(), item))
            self.max_depth = max(self.max_depth, len(self._items))
            self._changed.notify_all()

    async def get(self, accept: Callable[[Item], bool] = lambda _: True) -> Item:
        """The first acceptable item; waits for one. Call `poke` when what is acceptable may have changed."""
        async with self._changed:
            while True:
                for position, (since, item) in enumerate(self._items):
                    if accept(item):
                        del self._items[position]
                        self._waits.append(time.monotonic() - since)
                        self._changed.notify_all()
                        return item
                await self._changed.wait()

    async def poke(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def age(self) -> float:
        """Seconds the oldest item has waited."""
        return max((time.monotonic() - since for since, _ in self._items), default=0.0)

    def drain_stats(self) -> dict[str, float]:
        """depth (largest), wait_s (mean an item waited), blocked_s (producers, total) since the last call."""
        waits, self._waits = self._waits, []
        blocked, self._blocked = self._blocked, 0.0
        depth, self.max_depth = self.max_depth, len(self._items)
        return {"depth": float(depth), "wait_s": sum(waits) / len(waits) if waits else 0.0, "blocked_s": blocked}
