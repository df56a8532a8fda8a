"""The training side of the flow: admits groups, keeps the ledger, and collects the batch of each step."""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Sequence
from typing import Any

from actors.dispatcher import Dispatcher, Job
from pipeline.config.schema import Config
from pipeline.core.errors import RunFailed
from pipeline.core.prompts import PromptCursor
from pipeline.core.types import PolicyVersion, PromptItem
from pipeline.rl.advantages import AdvantageResult
from pipeline.rl.group_plan import rollout_call_index, scoring_seed, train_work
from pipeline.rl.ledger import FAILED, Ledger
from pipeline.rl.reward_combiner import Combiner

_MAX_REFILLS = 20  # a step that filters this many times its groups will never find enough of them
log = logging.getLogger("rushes.training")


class BatchBuilder:
    """The `Sink` of training groups."""

    def __init__(self, cfg: Config, flow: Dispatcher, prompts: Sequence[PromptItem]) -> None:
        self.cfg, self._flow, self._prompts = cfg, flow, prompts
        self._version: PolicyVersion | None = None
        self._cursor = PromptCursor(prompts, cfg.run.seed)
        self.ledger = Ledger(
            groups_per_step=cfg.algorithm.groups_per_step,
            max_staleness=cfg.algorithm.max_staleness,
            max_attempts=cfg.faults.max_attempts,
            max_failed_groups=cfg.faults.max_failed_groups,
            steps=cfg.run.steps,
        )
        self._combiner = Combiner(cfg.rewards, cfg.algorithm.advantage)
        self._scored: dict[int, Job] = {}
        self._waiting: list[tuple[int, int]] = []  # heap of (step, id): admitted, not submitted yet
        self._changed = asyncio.Condition()
        self._paused = True
        self._boundary = self._state()
        self.retired = False

    def retire(self) -> None:
        """Closes these books: the run goes on from a checkpoint with new ones, which admit the same groups again."""
        self.retired = True
        self._scored.clear()

    # ------------------------------------------------------------------------------------------- admission

    async def pump(self) -> None:
        """Runs for ever: admits groups as slots come free and submits those whose policy version is out."""
        while True:
            async with self._changed:
                await self._changed.wait_for(self._has_work)
                while (step := self.ledger.wanted()) is not None:
                    group = self.ledger.admit(step, self._cursor.next().index)
                    heapq.heappush(self._waiting, (step, group.id))
            while not self._paused and self._may_submit():  # paused: an evaluation began while this waited for room
                await self._flow.submit(*self._company())

    def _has_work(self) -> bool:
        return not self._paused and (self.ledger.wanted() is not None or self._may_submit())

    def _may_submit(self) -> bool:
        return bool(self._waiting) and self.ledger.may_start(self._waiting[0][1])

    def _company(self) -> list[Job]:
        """The next group that may start, and those that are drawn with it: neighbours in their step (`plan.company`),
        whoever is faster."""
        jobs = [self._job(heapq.heappop(self._waiting)[1])]
        first = self.ledger.groups[jobs[0].group]
        call = rollout_call_index(self.cfg, first.place)
        while call is not None and self._may_submit():
            other = self.ledger.groups[self._waiting[0][1]]
            if (other.step, rollout_call_index(self.cfg, other.place)) != (first.step, call):
                break
            jobs.append(self._job(heapq.heappop(self._waiting)[1]))
        return jobs

    def _job(self, group: int) -> Job:
        item = self.ledger.groups[group]
        work = train_work(self.cfg, group, item.step, self._prompts[item.prompt])
        return Job(work=work, sink=self, score_seed=scoring_seed(self.cfg, group))

    async def pause(self, paused: bool) -> None:
        async with self._changed:
            self._paused = paused
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------- Sink

    def version(self) -> PolicyVersion:
        """The newest that the ledger knows of: a worker may ask while the next one is on its way to it."""
        if self._version is None:
            raise RuntimeError("no version has been published yet")
        return self._version

    def started(self, job: Job, worker: str, version: PolicyVersion) -> int:
        return self.ledger.start(job.group, worker, version.number)

    def rolled(self, job: Job) -> None:
        self.ledger.rolled(job.group, job.work.attempt)

    def scoring(self, job: Job) -> None:
        self.ledger.scoring(job.group, job.work.attempt)

    def rollout_failed(self, job: Job, reason: str) -> bool:
        return self._after_failure(job, self.ledger.rollout_failed(job.group, job.work.attempt, reason))

    def handed_back(self, job: Job) -> None:
        self.ledger.handed_back(job.group, job.work.attempt)

    def scoring_failed(self, job: Job, reason: str) -> bool:
        return self._after_failure(job, self.ledger.scoring_failed(job.group, job.work.attempt, reason))

    def lost(self, job: Job, reason: str) -> bool:
        self._scored.pop(job.group, None)
        return self._after_failure(job, self.ledger.lost(job.group, job.work.attempt, reason))

    def _after_failure(self, job: Job, again: bool) -> bool:
        if not again:
            if self.ledger.too_many_failures:
                count = self.ledger.failed_in_row
                raise RunFailed(
                    f"{count} group{'s' if count > 1 else ''} in a row failed, each after "
                    f"{self.cfg.faults.max_attempts} attempts (faults.max_failed_groups: "
                    f"{self.cfg.faults.max_failed_groups}); the last one in {self.ledger.last_failure}"
                )
            self._flow.background(self._wake())
        return again

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def scored(self, job: Job) -> None:
        self.ledger.scored(job.group, job.work.attempt)
        if not self._keeps_media(job.work.step):
            job.media = None  # scored: nobody needs it any more
        if self.cfg.algorithm.advantage.zero_std == "filter" and self._combiner.is_flat(job.scores):
            self._filter(job)
        else:
            self._scored[job.group] = job
        await self._wake()

    def _filter(self, job: Job) -> None:
        log.info("filtered: all takes have the same reward", extra={"group": job.group})
        self.ledger.filter(job.group)
        job.media = job.trajectory = None
        seen = self.ledger.filtered_by_step[job.work.step]
        if seen >= _MAX_REFILLS * self.cfg.algorithm.groups_per_step:
            raise RunFailed(
                f"step {job.work.step}: {seen} groups had equal rewards in all takes and were filtered; "
                "check that the reward tells takes apart, raise sampler.noise_level, or set "
                "algorithm.advantage.zero_std=train"
            )

    def _keeps_media(self, step: int) -> bool:
        return self.cfg.tracking.save_takes_every > 0 and (step + 1) % self.cfg.tracking.save_takes_every == 0

    # ------------------------------------------------------------------------------------------- steps

    async def first(self, learner_version: int, count: int) -> list[Job]:
        """The first `count` jobs of the next step, in group order, once all of them are scored."""
        async with self._changed:
            while (groups := self.ledger.first(learner_version, count)) is None:
                await self._changed.wait()
            return [self._scored[group] for group in groups]

    def scored_first(self, learner_version: int) -> int:
        """How many `first` would give at once."""
        return self.ledger.scored_first(learner_version)

    def advantages(self, jobs: list[Job]) -> AdvantageResult:
        return self._combiner.step([job.scores for job in jobs])

    async def trajectories_lost(self, groups: list[int]) -> None:
        """Their node died between scoring and training: roll them out again."""
        for group in groups:
            job = self._scored[group]
            if self.lost(job, f"group {group}: its trajectory was lost with its node"):
                await self._flow.again(job)
        await self._wake()

    def consumed(self, jobs: list[Job], learner_version: int) -> None:
        """The learner has trained on `jobs`; their data is freed."""
        self.ledger.trained([job.group for job in jobs], learner_version)
        for job in jobs:
            del self._scored[job.group]
            job.trajectory = None
        self._combiner.commit()
        self._boundary = self._state()

    async def published(self, version: PolicyVersion) -> None:
        """Groups are drawn with `version` from now on."""
        async with self._changed:
            self.ledger.publish(version.number)
            self._version = version
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------- state

    def _state(self) -> dict[str, Any]:
        return {
            "cursor": self._cursor.state(),
            "ledger": self.ledger.state(),
            "rewards": self._combiner.state(),
        }  # all three made anew: what happens next does not show in them

    def state(self) -> dict[str, Any]:
        """As of the last completed step; groups admitted since are admitted again by the resumed run."""
        return self._boundary

    def load_state(self, state: dict[str, Any]) -> None:
        self._cursor.load_state(state["cursor"])
        self.ledger.load_state(state["ledger"])
        self._combiner.load_state(state.get("rewards"))
        self._waiting = sorted((group.step, group.id) for group in self.ledger.groups.values())
        self._boundary = self._state()

    @property
    def takes(self) -> int:
        """Training takes that reached an end, failed groups apart."""
        ended = self.ledger.ended
        return (sum(ended.values()) - ended[FAILED]) * self.cfg.algorithm.group_size
