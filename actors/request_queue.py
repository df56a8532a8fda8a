"""Requests that wait for a worker: the most urgent first, with back-pressure on whoever makes them.

The queues live in the controller and hold references and small metadata only. New work waits for room in a full queue;
a retry does not, since it might wait for its own consumer.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Request = TypeVar("Request")
Priority = tuple[int, ...]  # the lowest goes first; equal ones in order of arrival


@dataclass(order=True, slots=True)
class _Entry(Generic[Request]):
    priority: Priority
    number: int  # of arrival
    since: float = field(compare=False)
    request: Request | None = field(compare=False)  # None: withdrawn


class RequestQueue(Generic[Request]):
    """A bounded priority queue whose consumer may pass over requests. Adding and taking cost O(log n)."""

    def __init__(self, name: str, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"queue {name}: capacity {capacity} must be at least 1")
        self.name, self.capacity = name, capacity
        self._heap: list[_Entry[Request]] = []
        self._entries: dict[Request, _Entry[Request]] = {}  # without the withdrawn
        self._numbers = itertools.count()
        self._blocked: deque[asyncio.Future[None]] = deque()  # producers that wait for room
        self._arrived = asyncio.Event()
        self._max_depth = 0
        self._waits: list[float] = []  # seconds that requests waited, since the last `drain_stats`
        self._blocked_s = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    # ------------------------------------------------------------------------------------------- producers

    async def put(self, request: Request, priority: Priority = ()) -> None:
        """Adds a request, once there is room for it."""
        await self.room()
        self.add(request, priority)

    async def room(self) -> None:
        """Waits while the queue is full."""
        if len(self) < self.capacity and not self._blocked:
            return
        started = time.monotonic()
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._blocked.append(granted)
        try:
            await granted
        except asyncio.CancelledError:
            self._blocked.remove(granted)
            self._grant_room()  # what it was granted goes to the next one
            raise
        self._blocked.remove(granted)
        self._blocked_s += time.monotonic() - started

    def add(self, request: Request, priority: Priority = ()) -> None:
        """Adds a request, room or not."""
        entry = _Entry(priority, next(self._numbers), time.monotonic(), request)
        self._entries[request] = entry
        heapq.heappush(self._heap, entry)
        self._max_depth = max(self._max_depth, len(self))
        self._arrived.set()

    def withdraw(self, request: Request) -> None:
        """Removes a request that is still waiting; does nothing otherwise."""
        entry = self._entries.pop(request, None)
        if entry is not None:
            entry.request = None  # its entry leaves the heap when it comes up
            self._grant_room()

    # ------------------------------------------------------------------------------------------- consumers

    def take(self, usable: Callable[[Request], bool] = lambda _: True) -> Request | None:
        """The most urgent usable request, or None."""
        passed_over: list[_Entry[Request]] = []
        taken = None
        while self._heap and taken is None:
            entry = heapq.heappop(self._heap)
            if entry.request is not None and usable(entry.request):
                taken = entry.request
                del self._entries[taken]
                self._waits.append(time.monotonic() - entry.since)
                self._grant_room()
            elif entry.request is not None:
                passed_over.append(entry)
        for entry in passed_over:
            heapq.heappush(self._heap, entry)
        return taken

    async def take_more(
        self,
        room: int,
        size: Callable[[Request], int],
        within_s: float,
        usable: Callable[[Request], bool] = lambda _: True,
    ) -> list[Request]:
        """Usable requests that wait or arrive within `within_s` seconds, as long as their sizes fit into `room`."""
        requests: list[Request] = []
        deadline = time.monotonic() + within_s
        while room > 0:
            self._arrived.clear()
            left = room
            request = self.take(lambda request: size(request) <= left and usable(request))  # noqa: B023 (called here)
            if request is not None:
                requests.append(request)
                room -= size(request)
                continue
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._arrived.wait()
            except TimeoutError:
                break
        return requests

    async def get(self) -> Request:
        """The most urgent request; waits for one."""
        while (request := self.take()) is None:
            await self.wait()
        return request

    async def wait(self) -> None:
        """Returns once a request waits."""
        while not self._entries:
            self._arrived.clear()
            await self._arrived.wait()

    def waiting(self) -> list[Request]:
        """Everything that waits, in no particular order."""
        return list(self._entries)

    # ------------------------------------------------------------------------------------------- statistics

    def age(self) -> float:
        """Seconds that the oldest request has waited."""
        now = time.monotonic()
        return max((now - entry.since for entry in self._entries.values()), default=0.0)

    def drain_stats(self) -> dict[str, float]:
        """Since the last call: depth (largest), wait_s (mean, of a request), blocked_s (total, of producers); and age_s
        of the request that has waited longest."""
        waits, self._waits = self._waits, []
        blocked, self._blocked_s = self._blocked_s, 0.0
        depth, self._max_depth = self._max_depth, len(self)
        wait = sum(waits) / len(waits) if waits else 0.0
        return {"depth": float(depth), "wait_s": wait, "blocked_s": blocked, "age_s": self.age()}

    def _grant_room(self) -> None:
        """Wakes as many blocked producers as there is room for."""
        for granted in itertools.islice(self._blocked, max(0, self.capacity - len(self))):
            if not granted.done():
                granted.set_result(None)
