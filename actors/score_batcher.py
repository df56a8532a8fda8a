"""Brings groups to the servers of one reward, several in a call where the config allows it.

    put() ──► requests ──► free server ──► one call ──► each request's future

consumes    score requests, the most urgent first
waits for   a request; then a free server; then a moment for groups that fill the call to `batch_items` takes
unblocked   by `put` and `retry`, and by servers that come free

When a shared call fails as a whole, each of its groups is scored again in a call of its own, uncounted. What a
pre-empted server hands back goes to another one, uncounted. So a request's future only ever gets the scores, or a
failure that is this group's own.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from actors.group_run import GroupRun
from actors.ray_errors import is_preempted
from actors.ray_options import to_bytes
from actors.request_queue import RequestQueue
from actors.worker_pool import CallFailed, WorkerPool
from actors.worker_slot import WorkerSlot
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import RewardError
from pipeline.core.types import RewardScores
from pipeline.rewards.batching import WAIT_FOR_GROUPS_S

log = logging.getLogger("rushes.dispatcher")


@dataclass(eq=False)
class PendingScore:
    """One group in the queue of one reward. `scores` raises `CallFailed`."""

    run: GroupRun
    scores: asyncio.Future[RewardScores]
    avoid: str | None = None  # the server that has just failed on it
    alone: bool = False  # a call that it shared has failed as a whole

    @property
    def takes(self) -> int:
        return self.run.work.takes


class ScoreBatcher:
    """The queue of one reward and the calls of its servers. `pool`'s backlog is `requests`."""

    def __init__(self, reward: RewardConfig, pool: WorkerPool, requests: RequestQueue[PendingScore]) -> None:
        self._reward, self._pool, self.requests = reward, pool, requests

    async def put(self, run: GroupRun) -> PendingScore:
        """Queues a group, once there is room."""
        await self.requests.room()
        return self.retry(run)

    def retry(self, run: GroupRun, avoid: str | None = None) -> PendingScore:
        """Queues a group again, room or not."""
        request = PendingScore(run, asyncio.get_running_loop().create_future(), avoid)
        self.requests.add(request, run.priority)
        return request

    def withdraw(self, request: PendingScore) -> None:
        """Nobody waits for these scores any more."""
        self.requests.withdraw(request)
        if not request.scores.cancel() and not request.scores.cancelled():
            request.scores.exception()  # seen: asyncio would report one that nobody has looked at

    # ------------------------------------------------------------------------------------------- calls

    async def run(self) -> None:
        """Forms one call after the other; several may be under way."""
        async with asyncio.TaskGroup() as calls:
            while True:
                await self.requests.wait()
                formed = asyncio.Event()
                calls.create_task(self._serve(formed))
                await formed.wait()

    async def _serve(self, formed: asyncio.Event) -> None:
        """One call of one server."""
        batch: list[PendingScore] = []
        try:
            async with self._pool.lease(avoid=self._avoided_by_all()) as server:
                batch = await self._form(server)
                formed.set()
                if batch:
                    await self._score(server, batch)
        except CallFailed as failure:
            self._call_failed(batch, failure)
        finally:
            formed.set()

    def _avoided_by_all(self) -> str | None:
        avoided = {request.avoid for request in self.requests.waiting()}
        return avoided.pop() if len(avoided) == 1 else None

    async def _form(self, server: WorkerSlot) -> list[PendingScore]:
        """The most urgent group, and those that share its call."""

        def usable(request: PendingScore) -> bool:
            return not request.scores.done() and self._pool.may_use(server, request.avoid)

        first = self.requests.take(usable)
        if first is None:
            return []
        if first.alone:
            return [first]
        return [
            first,
            *await self.requests.take_more(
                self._reward.batch_items - first.takes,
                lambda request: request.takes,
                WAIT_FOR_GROUPS_S,
                lambda request: not request.alone and usable(request),
            ),
        ]

    async def _score(self, server: WorkerSlot, batch: list[PendingScore]) -> None:
        runs = [request.run for request in batch]
        groups = ", ".join(str(run.group) for run in runs)
        server.activity = f"{runs[0].work.purpose} group {groups}"
        works = to_bytes([run.work for run in runs])
        call = server.actor.score.remote(works, *(run.media for run in runs))
        outcomes: list[RewardScores | RewardError] = await self._pool.result(server, call, "scored")
        for request, outcome in zip(batch, outcomes, strict=True):
            if request.scores.done():
                continue  # withdrawn meanwhile
            if isinstance(outcome, RewardError):
                request.scores.set_exception(CallFailed(server, outcome))
            else:
                request.scores.set_result(outcome)

    def _call_failed(self, batch: list[PendingScore], failure: CallFailed) -> None:
        shared = len(batch) > 1
        batch = [request for request in batch if not request.scores.done()]
        if is_preempted(failure.cause):
            for request in batch:
                request.avoid = failure.worker_name
                self.requests.add(request, request.run.priority)
        elif shared:
            log.warning("scoring %d groups in one call failed: %s; they are scored one by one", len(batch), failure)
            for request in batch:
                request.avoid, request.alone = None, True
                self.requests.add(request, request.run.priority)
        elif batch:
            batch[0].scores.set_exception(failure)
