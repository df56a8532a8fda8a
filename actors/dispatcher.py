"""Groups on their way through rollout workers and reward servers, with retries.

A group travels as a `Job`; those that one worker draws in one call travel to it as a `Draw`. What a group is for
(training, evaluation) is behind `Sink`, which keeps the books and decides whether a failed attempt is repeated. Each
worker has a loop here that takes from its queue, one item at a time.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import ray

from actors.policy_versions import Publisher
from actors.queues import BoundedQueue
from actors.ray_errors import describe, is_deterministic, is_lost, is_preempted
from actors.ray_options import RunContext, to_bytes
from actors.reward_server import RewardServer, ScoreRequest
from actors.rollout_worker import RolloutWorker
from actors.tender import Tender
from actors.worker_pool import IDLE, WorkerPool, WorkerSlot, together
from pipeline.core.errors import RewardError
from pipeline.core.types import GroupWork, PolicyVersion, PromptItem, RewardScores, RolloutMeta
from pipeline.rewards.batching import WAIT_FOR_GROUPS_S

log = logging.getLogger("rushes.flow")


@dataclass(eq=False)
class Job:
    """One rollout attempt of one group, and what came of it. A retry of the rollout is a new job."""

    work: GroupWork
    sink: Sink
    score_seed: int | None  # frame picks; None: centre picks
    meta: RolloutMeta = field(init=False)  # once rolled out
    media: ray.ObjectRef | None = None
    trajectory: ray.ObjectRef | None = None
    scores: dict[str, RewardScores] = field(default_factory=dict)
    abandoned: bool = False  # failed or lost while some server still had it; late results are dropped

    @property
    def group(self) -> int:
        return self.work.group

    @property
    def over(self) -> bool:
        """Nobody waits for it any more."""
        return self.abandoned or self.sink.retired


@dataclass(eq=False)
class Draw:
    """Groups of one purpose and policy version that a worker draws in one call."""

    jobs: tuple[Job, ...]
    avoid: str | None = None  # worker that has just failed on it: another one takes it, if there is one


@dataclass(eq=False)
class ScoreTask:
    """One reward of one job, in that reward's queue."""

    job: Job
    reward: str
    avoid: str | None = None
    alone: bool = False  # a call that it shared has failed as a whole: it gets one of its own


class Sink(Protocol):
    """The books of one purpose. The `*_failed` and `lost` methods return True when the job shall be tried again.
    `retired`: its books are closed (the run was rolled back); what its jobs still bring is dropped."""

    retired: bool

    def version(self) -> PolicyVersion: ...
    def started(self, job: Job, worker: str, version: PolicyVersion) -> int: ...  # the attempt's number
    def rolled(self, job: Job) -> None: ...
    def scoring(self, job: Job) -> None: ...
    def rollout_failed(self, job: Job, reason: str) -> bool: ...
    def scoring_failed(self, job: Job, reason: str) -> bool: ...
    def lost(self, job: Job, reason: str) -> bool: ...
    def handed_back(self, job: Job) -> None: ...  # by a worker that goes, untouched: the try does not count
    async def scored(self, job: Job) -> None: ...


class Dispatcher:
    """Queues, pools and worker loops of one run. `fatal` receives the exception that ends the run."""

    def __init__(
        self, ctx: RunContext, publisher: Publisher, fatal: asyncio.Future, probe_prompts: list[PromptItem]
    ) -> None:
        self.ctx, self.publisher, self._fatal = ctx, publisher, fatal
        cfg = ctx.cfg
        capacity = cfg.rollout.queue_capacity
        self.queue: BoundedQueue[Draw] = BoundedQueue("rollout", capacity)
        self.score_queues = {name: BoundedQueue[ScoreTask](f"reward.{name}", capacity) for name in cfg.rewards}
        rollout = cfg.rollout
        self.rollouts = WorkerPool(
            ctx,
            RolloutWorker,
            "rollout",
            rollout.workers,
            resources=rollout.resources,
            threads=rollout.threads,
            start_args=(probe_prompts,),
        )
        self.rewards = {
            name: WorkerPool(
                ctx,
                RewardServer,
                f"reward.{name}",
                reward.workers,
                resources=reward.resources,
                threads=reward.threads,
                start_args=(name, probe_prompts),
                runtime_env=reward.runtime_env,
            )
            for name, reward in cfg.rewards.items()
        }
        self.tender = Tender({queue.name: (queue, pool) for queue, pool in zip(self.queues, self.pools, strict=True)})
        self._tasks: set[asyncio.Task] = set()

    @property
    def queues(self) -> list[BoundedQueue]:
        return [self.queue, *self.score_queues.values()]

    @property
    def pools(self) -> list[WorkerPool]:
        return [self.rollouts, *self.rewards.values()]

    async def start(self) -> None:
        """Starts all actors; returns once there is one of each kind."""
        starts = [self.rollouts.start(self._rollout_loop, self.queue.poke, self.background)]
        for name, pool in self.rewards.items():
            work = functools.partial(self._score_loop, name, pool)
            starts.append(pool.start(work, self.score_queues[name].poke, self.background))
        self.background(self.tender.run())
        await together(*starts)

    def background(self, coroutine) -> asyncio.Task:
        """Runs a loop whose exception ends the run."""
        task = asyncio.ensure_future(coroutine)
        task.add_done_callback(self._ended)
        self._tasks.add(task)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._fatal.done():
            self._fatal.set_exception(error)

    async def stop(self) -> None:
        self.tender.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pool in self.pools:
            pool.stop()

    async def submit(self, *jobs: Job) -> None:
        """Waits for room in the rollout queue. Several jobs are drawn in one call; when it fails, each gets its own."""
        await self.queue.put(Draw(jobs))

    async def again(self, job: Job, avoid: str | None = None) -> None:
        """The same group on the same seeds, at the front of the rollout queue."""
        job.abandoned = True
        job.media = job.trajectory = None
        await self.queue.put_back(Draw((Job(work=job.work, sink=job.sink, score_seed=job.score_seed),), avoid))

    # ------------------------------------------------------------------------------------------- rollout

    async def _rollout_loop(self, slot: WorkerSlot) -> None:
        """Draws groups with the slot's worker until the slot rests."""
        pool = self.rollouts
        while True:
            draw = await self.queue.get_until(
                lambda: slot.resting, lambda draw: draw.avoid != slot.name or not pool.others_alive(slot)
            )
            if draw is None:
                return
            jobs = [job for job in draw.jobs if not job.over]
            del draw
            if not jobs:
                continue
            version = jobs[0].sink.version()
            for job in jobs:
                attempt = job.sink.started(job, slot.name, version)
                job.work = replace(job.work, attempt=attempt)
            started = time.monotonic()
            try:
                slot.doing = f"{jobs[0].work.purpose} group {', '.join(str(job.group) for job in jobs)}"
                order = to_bytes(([job.work for job in jobs], version.key))
                metas, *drawn = slot.actor.generate.options(num_returns=1 + 2 * len(jobs)).remote(
                    order, self.publisher.missing(slot, version)
                )
                answers = await self._timed(metas, "generated")
                self.publisher.confirmed(slot, version, answers[0].seconds.get("load", 0.0))
            except Exception as error:
                await self._rollout_failed(slot, jobs, error)
            else:
                pool.history.finished(time.monotonic() - started)
                slot.doing = "handing over"
                jobs = [job for job in self._drawn(jobs, answers, drawn) if not job.over]
                del metas, drawn  # the jobs alone keep them alive
                for job in jobs:
                    job.sink.rolled(job)
                for job in jobs:
                    await self._to_scoring(job)
                slot.doing = IDLE
            del jobs, job

    @staticmethod
    def _drawn(jobs: list[Job], metas: list[RolloutMeta], drawn: list[ray.ObjectRef]) -> list[Job]:
        """The jobs with what came of them; `drawn`: media and trajectory of each in turn."""
        for job, meta, media, trajectory in zip(jobs, metas, drawn[::2], drawn[1::2], strict=True):
            job.meta = meta
            if not job.over:
                job.media, job.trajectory = media, trajectory
        return jobs

    async def _timed(self, awaitable: Awaitable[Any], what: str) -> Any:
        limit = self.ctx.cfg.faults.call_timeout_s
        try:
            async with asyncio.timeout(limit):  # unlike wait_for, without a task of its own
                return await awaitable
        except TimeoutError:
            raise TimeoutError(f"not {what} within {limit:g} s (faults.call_timeout_s)") from None

    async def _rollout_failed(self, slot: WorkerSlot, jobs: list[Job], error: Exception) -> None:
        """A group's own failure; or that of a call for several, whose groups are then drawn one by one, uncounted."""
        reason = f"{slot.place}: {describe(error)}"
        going, alone = is_preempted(error), len(jobs) == 1
        healthy = is_deterministic(error) or is_lost(error)
        if going:
            slot.doing, slot.moving = IDLE, describe(error)
        elif not healthy:
            slot.info = {}  # not alive: other workers need not wait for it
        if not going and not alone:
            log.warning("drawing %d groups in one call failed: %s; they are drawn one by one", len(jobs), reason)
        for job in reversed(jobs):
            if job.over:
                continue
            if going or not alone:
                job.sink.handed_back(job)
                again = True
            else:
                again = job.sink.rollout_failed(job, reason)
                self._log_failure(job, "rollout", reason, again)
            if again:
                await self.again(job, avoid=slot.name)
        if going:
            return
        if healthy:
            slot.doing = IDLE
            return
        await self.rollouts.replace(slot, describe(error))

    # ------------------------------------------------------------------------------------------- scoring

    async def _to_scoring(self, job: Job) -> None:
        job.sink.scoring(job)
        await asyncio.gather(*(queue.put(ScoreTask(job, name)) for name, queue in self.score_queues.items()))

    async def _score_loop(self, reward: str, pool: WorkerPool, slot: WorkerSlot) -> None:
        """Scores groups with the slot's server until the slot rests."""
        queue = self.score_queues[reward]
        while True:
            task = await queue.get_until(
                lambda: slot.resting, lambda task: task.avoid != slot.name or not pool.others_alive(slot)
            )
            if task is None:
                return
            job = task.job
            if job.over:
                continue
            company = await self._company(task, slot, pool)
            tasks = [one for one in (task, *company) if not one.job.over]  # some may have ended meanwhile
            del company
            if not tasks:
                continue
            slot.doing = f"{job.work.purpose} group {', '.join(str(one.job.group) for one in tasks)}"
            started = time.monotonic()
            try:
                asked = [ScoreRequest(one.job.group, one.job.work.prompts, one.job.score_seed) for one in tasks]
                reference = slot.actor.score.remote(to_bytes(asked), *(one.job.media for one in tasks))
                outcomes = await self._timed(reference, "scored")
            except Exception as error:
                await self._score_failed(pool, slot, tasks, error)
            else:
                pool.history.finished(time.monotonic() - started)
                slot.doing = IDLE
                for one, outcome in zip(tasks, outcomes, strict=True):
                    if isinstance(outcome, RewardError):
                        await self._score_failed(pool, slot, [one], outcome)
                    else:
                        await self._one_scored(one, outcome)
                del one
            del task, tasks, job

    async def _company(self, task: ScoreTask, slot: WorkerSlot, pool: WorkerPool) -> list[ScoreTask]:
        """Further groups for the call that will score `task`, as far as `batch_items` allows."""
        reward = self.ctx.cfg.rewards[task.reward]
        if task.alone:
            return []

        def accept(other: ScoreTask) -> bool:
            free = not other.alone and not other.job.over
            return free and (other.avoid != slot.name or not pool.others_alive(slot))

        room = reward.batch_items - task.job.work.takes
        queue = self.score_queues[task.reward]
        return await queue.get_more(room, lambda other: other.job.work.takes, WAIT_FOR_GROUPS_S, accept)

    async def _one_scored(self, task: ScoreTask, scores: RewardScores) -> None:
        job = task.job
        if job.over:
            return
        job.scores[task.reward] = scores
        if len(job.scores) == len(self.score_queues):
            job.scores = {name: job.scores[name] for name in self.score_queues}  # config order, not arrival
            await job.sink.scored(job)

    async def _score_failed(self, pool: WorkerPool, slot: WorkerSlot, tasks: list[ScoreTask], error: Exception) -> None:
        """A group's own failure; or that of a whole call, whose groups are then scored one by one, uncounted."""
        task = tasks[0]
        job, reason = task.job, f"{slot.place}: {describe(error)}"
        if is_preempted(error):
            slot.doing, slot.moving = IDLE, describe(error)
            for one in reversed(tasks):
                await self.score_queues[one.reward].put_back(replace(one, avoid=slot.name))
            return
        lost = is_lost(error)
        healthy = is_deterministic(error) or lost
        if not healthy:
            slot.info = {}
        if len(tasks) > 1:
            log.warning("scoring %d groups in one call failed: %s; they are scored one by one", len(tasks), reason)
            for one in reversed(tasks):
                await self.score_queues[one.reward].put_back(replace(one, avoid=None, alone=True))
        elif not job.over:
            again = job.sink.lost(job, reason) if lost else job.sink.scoring_failed(job, reason)
            self._log_failure(job, "scoring", reason, again)
            if lost and again:
                await self.again(job)
            elif again:
                job.sink.scoring(job)
                await self.score_queues[task.reward].put_back(ScoreTask(job, task.reward, avoid=slot.name))
            else:
                job.abandoned = True
                job.media = job.trajectory = None
        if healthy:
            slot.doing = IDLE
            return
        await pool.replace(slot, describe(error))

    def _log_failure(self, job: Job, what: str, reason: str, again: bool) -> None:
        outcome = "it is tried again" if again else "the group has failed"
        log.warning("%s failed: %s; %s", what, reason, outcome, extra={"group": job.group})
