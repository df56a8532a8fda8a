"""The one thread that calls the scorer of `rushes serve-reward`, the loop that feeds it, and what watches both."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.request_queue import RequestQueue
from pipeline.core.errors import RewardError, one_line
from pipeline.core.types import RewardScores
from pipeline.rewards.batching import WAIT_FOR_GROUPS_S, Takes, score_groups
from pipeline.rewards.runner import RewardRunner

MAX_WAITING = 4096  # requests; their memory is bounded elsewhere
WATCH_EVERY_S = 0.5
log = logging.getLogger("rushes.server")
Outcome = RewardScores | RewardError


class ScorerBroken(Exception):
    """The scorer raised what no scorer may (CancelledError, SystemExit, …), or the server has a bug: one line."""


class NotScoring(Exception):
    """The scoring loop is dead or stuck: one line."""


@dataclass(eq=False)
class Work:
    """A request: its takes by shape and rate (a group each), where they stood, and what came of them."""

    groups: list[Takes]
    places: list[list[int]]
    outcomes: asyncio.Future[list[Outcome]]

    @property
    def takes(self) -> int:
        return sum(len(places) for places in self.places)

    def fail(self, error: Exception) -> None:
        if not self.outcomes.done():
            self.outcomes.set_exception(error)


class ScoringLoop:
    """Scores one call at a time; requests that wait together are joined up to `batch_items`. `problem` tells why
    nothing is scored: the loop has ended, or a call has run for more than `stuck_s` seconds. Whatever a scorer raises
    fails its requests and not the loop."""

    def __init__(self, runner: RewardRunner, stuck_s: float) -> None:
        self.runner, self.stuck_s = runner, stuck_s
        self.queue: RequestQueue[Work] = RequestQueue("score", MAX_WAITING)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._in_hand: list[Work] = []
        self._call_started: float | None = None
        self._ended: str | None = None

    @property
    def call_s(self) -> float | None:
        """Seconds that the present call of the scorer has run; None between calls."""
        return None if self._call_started is None else round(time.monotonic() - self._call_started, 1)

    @property
    def problem(self) -> str | None:
        """One line, or None while all is well."""
        if self._ended is not None:
            return f"the scoring loop has ended ({self._ended}); restart the server"
        if self._call_started is not None and (seconds := time.monotonic() - self._call_started) > self.stuck_s:
            return f"a call of the scorer has run for {seconds:.0f} s (--stuck-s {self.stuck_s:g}); restart the server"
        return None

    async def score(self, work: Work) -> list[Outcome]:
        """Raises `ScorerBroken` or `NotScoring`."""
        if problem := self.problem:
            raise NotScoring(problem)
        await self.queue.put(work)
        return await work.outcomes

    async def running(self, _app: Any = None) -> Any:
        """For aiohttp's `cleanup_ctx`: runs until the application ends."""
        threading.Thread(target=self._thread, name="scorer", daemon=True).start()
        tasks = [asyncio.create_task(self._supervised()), asyncio.create_task(self._watch())]
        yield
        self._ended = self._ended or "the server ends"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _supervised(self) -> None:
        try:
            await self._loop()
        except BaseException as error:  # also CancelledError: a loop that ends says so
            if self._ended is None:
                self._ended = f"{type(error).__name__}: {one_line(error, 200)}"
                log.error("the scoring loop has ended", exc_info=error)
            self._fail_all()
            raise

    async def _watch(self) -> None:
        """Answers those who wait for a call that is stuck."""
        told = False
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            problem = self.problem
            if problem and not told:
                log.error(problem)
            told = problem is not None
            if problem:
                self._fail_all()

    def _fail_all(self) -> None:
        error = NotScoring(self.problem or "the server ends")
        for work in self._in_hand:
            work.fail(error)
        while (waiting := self.queue.take()) is not None:
            waiting.fail(error)

    async def _loop(self) -> None:
        cfg = self.runner.cfg
        while True:
            self._in_hand = [await self.queue.get()]
            room = cfg.batch_items - self._in_hand[0].takes
            self._in_hand += await self.queue.take_more(room, lambda work: work.takes, WAIT_FOR_GROUPS_S)
            works = [work for work in self._in_hand if not work.outcomes.done()]
            if not works:
                continue
            outcomes = await self._call([group for work in works for group in work.groups])
            for work in works:
                if isinstance(outcomes, ScorerBroken):
                    work.fail(outcomes)
                    continue
                own, outcomes = outcomes[: len(work.groups)], outcomes[len(work.groups) :]
                if not work.outcomes.done():
                    work.outcomes.set_result(own)
            self._in_hand = []

    async def _call(self, groups: Sequence[Takes]) -> list[Outcome] | ScorerBroken:
        """One call in the scorer's thread. What the scorer raises comes back as a value: some exceptions
        (CancelledError, StopIteration, SystemExit) would do something else when raised through a future."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[list[Outcome] | ScorerBroken] = loop.create_future()

        def call() -> None:
            outcome: list[Outcome] | ScorerBroken
            try:
                outcome = score_groups(self.runner, groups)
            except BaseException as error:
                log.error("the scorer failed", exc_info=error)
                outcome = ScorerBroken(f"the scorer raised {type(error).__name__}: {one_line(error, 200)}")
            with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(_resolve, answered, outcome)

        self._call_started = time.monotonic()
        try:
            self._calls.put(call)
            return await answered
        finally:
            self._call_started = None

    def _thread(self) -> None:
        while True:
            self._calls.get()()


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)
