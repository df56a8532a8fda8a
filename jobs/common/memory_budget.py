"""Memory that requests share: each reserves what it will take before it takes it."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from types import TracebackType
from typing import Self

HEAD_START = 2**16  # bytes


class TooLarge(Exception):
    """More than the whole budget."""


class NoRoom(Exception):
    """Others hold the memory, and did not give it back in time."""


class MemoryBudget:
    """Bytes, handed out smallest request first, so that one large request does not hold up many small ones."""

    def __init__(self, total: int) -> None:
        self.total, self.free = total, total
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # (bytes, arrival, granted)
        self._growing: set[GrowingReservation] = set()

    async def reserve(self, size: int, within_s: float) -> Reservation:
        """Waits for `size` bytes. Raises `TooLarge`, or `NoRoom` after `within_s` seconds."""
        if size > self.total:
            raise TooLarge
        reservation = Reservation(self)
        await self._take(reservation, size, within_s)
        return reservation

    async def _take(self, reservation: Reservation, size: int, within_s: float) -> None:
        if size > self.free:
            granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (size, next(self._numbers), granted))
            try:
                async with asyncio.timeout(within_s):
                    await granted  # `_give_back` has taken the bytes from `free`
            except BaseException as error:
                if granted.done() and not granted.cancelled():  # granted in the moment in which the wait ended
                    self._give_back(size)
                granted.cancel()
                if isinstance(error, TimeoutError):
                    raise NoRoom from None
                raise
        else:
            self.free -= size
        reservation.size += size

    def _give_back(self, size: int) -> None:
        self.free += size
        while self._waiting and (self._waiting[0][2].done() or self._waiting[0][0] <= self.free):
            wanted, _, granted = heapq.heappop(self._waiting)
            if not granted.done():
                self.free -= wanted
                granted.set_result(None)


class Reservation:
    """`size` bytes of a budget, until `release` or the end of the `with` block."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget, self.size = budget, 0

    def release(self) -> None:
        """Gives the bytes back; once is enough, twice does no harm."""
        size, self.size = self.size, 0
        self._budget._give_back(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class GrowingReservation(Reservation):
    """Grows with what arrives. When the budget is full, the one that grows slowest gives way: clients that send much
    and never finish cannot keep others out."""

    def __init__(self, budget: MemoryBudget) -> None:
        super().__init__(budget)
        self.gave_way = False
        self._deadline: asyncio.Timeout | None = None
        self._started = time.monotonic()

    def growing_under(self, deadline: asyncio.Timeout) -> None:
        """From now on it grows, and may be ended through `deadline`; until `finished`."""
        self._deadline = deadline
        self._budget._growing.add(self)

    def finished(self) -> None:
        """It grows no more, and need not give way."""
        self._budget._growing.discard(self)

    async def grow(self, size: int) -> None:
        """Raises `NoRoom`."""
        budget = self._budget
        if size > budget.free and not self.gave_way:
            slowest = min(budget._growing, key=lambda other: other._rate)
            if slowest is self:
                raise NoRoom
            slowest._give_way()
        await budget._take(self, size, within_s=30)

    @property
    def _rate(self) -> float:
        """Bytes a second; with a head start for those that have only begun."""
        return (self.size + HEAD_START) / (time.monotonic() - self._started + 1e-3)

    def _give_way(self) -> None:
        self.gave_way = True
        self.finished()
        if self._deadline is not None:
            with contextlib.suppress(RuntimeError):  # it is just running out
                self._deadline.reschedule(asyncio.get_running_loop().time())

    def release(self) -> None:
        self.finished()
        super().release()
