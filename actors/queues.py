"""Bounded queues between the roles. They live in the controller and hold references and small metadata only.

A full queue blocks its producer: that is the back-pressure. There are no end markers; a consumer is cancelled. An item
is handed to one waiting consumer, which alone wakes up, so its cost does not grow with the number of workers.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")
Accept = Callable[[Item], bool]


class BoundedQueue(Generic[Item]):
    """First in, first out, except that a consumer may pass over items it should not take (`accept`)."""

    def __init__(self, name: str, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"queue {name}: capacity {capacity} must be at least 1")
        self.name, self.capacity = name, capacity
        self._items: deque[tuple[float, Item]] = deque()
        # Those waiting, longest first: consumers for an acceptable item, producers for room.
        self._getters: dict[asyncio.Future[tuple[float, Item] | None], tuple[Accept, Callable[[], bool]]] = {}
        self._putters: dict[asyncio.Future[None], Item] = {}
        self.max_depth = 0
        self._waits: list[float] = []  # seconds that items spent in the queue since the last `drain_stats`
        self._blocked = 0.0  # seconds that producers waited for room

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: Item) -> None:
        """Waits while the queue is full."""
        if len(self._items) < self.capacity and not self._putters:
            self._add(item)
            return
        asked = time.monotonic()
        room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._putters[room] = item
        try:
            await room  # whoever makes room also puts the item in
        finally:
            self._putters.pop(room, None)
            self._blocked += time.monotonic() - asked

    async def put_back(self, item: Item) -> None:
        """A retried item goes to the front, room or not: its consumer cannot wait for itself to make room."""
        self._add(item, front=True)

    async def get(self, accept: Accept = lambda _: True) -> Item:
        """The first acceptable item; waits for one. Call `poke` when what is acceptable may have changed."""
        item = await self.get_until(lambda: False, accept)
        assert item is not None  # it is never told to give up
        return item

    async def get_until(self, until: Callable[[], bool], accept: Accept = lambda _: True) -> Item | None:
        """As `get`, but gives up with None once `until()` is true; call `poke` when it may have become so."""

        def wanted(item: Item) -> bool:
            return not until() and accept(item)

        if until():
            return None
        found = self._take(wanted)
        if found is None:
            handed: asyncio.Future[tuple[float, Item] | None] = asyncio.get_running_loop().create_future()
            self._getters[handed] = (wanted, until)
            try:
                found = await handed
            except asyncio.CancelledError:
                if handed.done() and not handed.cancelled() and (entry := handed.result()) is not None:
                    self._add(entry[1], front=True)  # cancelled after it was handed something
                raise
            finally:
                self._getters.pop(handed, None)
        if found is None:
            return None
        since, item = found
        self._waits.append(time.monotonic() - since)
        return item

    async def get_more(
        self, room: int, size: Callable[[Item], int], within_s: float, accept: Accept = lambda _: True
    ) -> list[Item]:
        """Acceptable items that are there or come within `within_s` seconds, as long as their sizes fit into `room`."""
        items: list[Item] = []
        until = time.monotonic() + within_s
        while room > 0:
            left = room
            try:  # at least a moment, so that what is already there is always taken
                item = await asyncio.wait_for(
                    self.get(lambda item: accept(item) and size(item) <= left),  # noqa: B023 (awaited right here)
                    max(until - time.monotonic(), 0.001),
                )
            except TimeoutError:
                break
            items.append(item)
            room -= size(item)
        return items

    async def poke(self) -> None:
        """Offers the items to the waiting consumers again."""
        for handed, (wanted, until) in list(self._getters.items()):
            if handed.done():
                continue
            found = self._take(wanted)
            if found is not None or until():
                del self._getters[handed]
                handed.set_result(found)

    def _take(self, accept: Accept) -> tuple[float, Item] | None:
        for position, entry in enumerate(self._items):
            if accept(entry[1]):
                del self._items[position]
                self._fill()
                return entry
        return None

    def _fill(self) -> None:
        """Lets waiting producers in, as far as there is room."""
        while self._putters and len(self._items) < self.capacity:
            room = next(iter(self._putters))
            item = self._putters.pop(room)
            if not room.done():
                room.set_result(None)
                self._add(item)

    def _add(self, item: Item, front: bool = False) -> None:
        now = time.monotonic()
        for handed, (wanted, _) in self._getters.items():
            if not handed.done() and wanted(item):
                del self._getters[handed]
                handed.set_result((now, item))
                return
        if front:
            self._items.appendleft((now, item))
        else:
            self._items.append((now, item))
        self.max_depth = max(self.max_depth, len(self._items))

    def age(self) -> float:
        """Seconds the oldest item has waited."""
        return max((time.monotonic() - since for since, _ in self._items), default=0.0)

    def drain_stats(self) -> dict[str, float]:
        """depth (largest), wait_s (mean an item waited), blocked_s (producers, total) since the last call; age_s of the
        item that waits the longest now."""
        waits, self._waits = self._waits, []
        blocked, self._blocked = self._blocked, 0.0
        depth, self.max_depth = self.max_depth, len(self._items)
        age = time.monotonic() - min(since for since, _ in self._items) if self._items else 0.0
        wait = sum(waits) / len(waits) if waits else 0.0
        return {"depth": float(depth), "wait_s": wait, "blocked_s": blocked, "age_s": age}
