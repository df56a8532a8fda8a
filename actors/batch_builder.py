"""Builds the batch of each optimisation step: admits groups, awaits their scores, hands them to the learner in chunks.

    ledger ──admit──► GroupRun ──await run_group──► scored ──chunks()──► learner ──consumed()──► ended

admission_loop  consumes    free slots of the ledger, prompts in their shuffled order
                waits for   a policy version that is fresh enough, room at the rollout workers, the end of an evaluation
                unblocked   by groups that end, by `published`, by `pause(False)`
chunks          consumes    scored groups, in id order
                waits for   the next groups of the step, whoever was faster
                unblocked   by groups that are scored

The batch of a step is the same in every run, whichever worker was faster: `pipeline.rl.ledger`.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.group_run import GroupFailed, GroupRun, GroupRunner
from pipeline.config.schema import Config
from pipeline.core.errors import RunFailed
from pipeline.core.prompts import PromptCursor
from pipeline.core.types import GroupWork, PolicyVersion, PromptItem
from pipeline.rl.group_plan import accumulation_chunks, rollout_call_index, steps_ahead
from pipeline.rl.ledger import FAILED, Ledger
from pipeline.rl.signals import SignalResult, signal_of
from pipeline.rl.sources import source_of

_MAX_REFILLS = 20  # a step that filters this many times its groups will never find enough of them
log = logging.getLogger("rushes.training")


@dataclass(eq=False)
class StepChunk:
    """Groups of a step that the learner gets in one call."""

    start: int  # position of the first one in the batch; 0 begins the step, or begins it again
    runs: list[GroupRun]
    so_far: list[GroupRun]  # the batch up to here
    last: bool  # the chunk ends the step
    lost: list[int] = field(default_factory=list)  # set by the learner's side: groups whose trajectory is gone


class BatchBuilder:
    """The training groups of a run, and their ledger."""

    def __init__(self, cfg: Config, runner: GroupRunner, prompts: Sequence[PromptItem]) -> None:
        self.cfg, self._runner = cfg, runner
        self._prompts = {prompt.index: prompt for prompt in prompts}
        self._version: PolicyVersion | None = None
        self._cursor = PromptCursor(prompts, cfg.run.seed)
        self.ledger = Ledger(
            groups_per_step=cfg.step.groups,
            max_staleness=steps_ahead(cfg),
            max_failed_groups=cfg.faults.max_failed_groups,
            steps=cfg.run.steps,
        )
        self._signal = signal_of(cfg).begin(cfg.rewards)
        self._source = source_of(cfg)
        self._scored: dict[int, GroupRun] = {}
        self._waiting: list[tuple[int, int]] = []  # heap of (step, id): admitted, not started yet
        self._changed = asyncio.Condition()
        self._paused = True
        self._state_at_last_step = self._state()
        self._tasks: asyncio.TaskGroup | None = None

    # ------------------------------------------------------------------------------------------- admission

    async def run(self) -> None:
        """Admits groups and awaits them, until it is cancelled (a run that is rolled back starts another builder).
        Raises `RunFailed` when too many groups fail or are filtered."""
        async with asyncio.TaskGroup() as self._tasks:
            await self._admission_loop(self._tasks)

    async def _admission_loop(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(self._has_work)
                while (step := self.ledger.step_to_admit()) is not None:
                    group = self.ledger.admit(step, self._cursor.next().index)
                    heapq.heappush(self._waiting, (step, group.id))
            while self._may_start():
                await self._runner.room()
                if not self._may_start():  # an evaluation began meanwhile
                    break
                tasks.create_task(self._run_call(self._next_call()))
                await asyncio.sleep(0)  # it is waiting for a worker before there is room for the next one

    def _has_work(self) -> bool:
        return not self._paused and (self.ledger.step_to_admit() is not None or self._may_start())

    def _may_start(self) -> bool:
        return not self._paused and self._next_is_fresh()

    def _next_is_fresh(self) -> bool:
        return bool(self._waiting) and self.ledger.may_start(self._waiting[0][1])

    def _next_call(self) -> list[GroupRun]:
        """The next group, and those of its step that share its rollout call: fixed by their places in the step, so
        that results do not depend on timing."""
        runs = [self._group_run(heapq.heappop(self._waiting)[1])]
        first = self.ledger.groups[runs[0].group]
        call = rollout_call_index(self.cfg, first.position) if self._source.draws else None
        while call is not None and self._next_is_fresh():
            other = self.ledger.groups[self._waiting[0][1]]
            if (other.step, rollout_call_index(self.cfg, other.position)) != (first.step, call):
                break
            runs.append(self._group_run(heapq.heappop(self._waiting)[1]))
        return runs

    def _group_run(self, group: int) -> GroupRun:
        entry = self.ledger.groups[group]
        prompt = self._prompts[entry.prompt]
        return GroupRun(self._source.work(self.cfg, group, entry.step, prompt, self._runner.grid))

    async def pause(self, paused: bool) -> None:
        """While paused, no further group is started."""
        async with self._changed:
            self._paused = paused
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------- a group's life

    async def _run_call(self, runs: list[GroupRun]) -> None:
        """Draws groups that share a rollout call; each is then scored by itself."""
        if len(runs) == 1:
            await self._run_group(runs[0])
            return
        await self._runner.rollout_together(runs, self.policy)
        async with asyncio.TaskGroup() as groups:
            for run in runs:
                groups.create_task(self._run_group(run))

    async def _run_group(self, run: GroupRun, lost: str = "") -> None:
        """From its rollout to the batch of its step, or to its end as filtered or failed. Raises `RunFailed`."""
        try:
            await self._runner.run_group(run, self.policy, lost)
        except GroupFailed as failure:
            self.ledger.failed(run.group, failure.reason, run.retries)
            self._check_failures()
        else:
            self.ledger.scored(run.group, run.retries)
            run.retries = 0  # counted
            self._collect(run)
        async with self._changed:
            self._changed.notify_all()

    def policy(self, works: Sequence[GroupWork]) -> PolicyVersion:
        """The version to draw `works` with, as the ledger notes."""
        for work in works:
            self.ledger.start(work.group, self.version.number)
        return self.version

    @property
    def version(self) -> PolicyVersion:
        """The newest one that the ledger knows of, while the next one may be on its way."""
        if self._version is None:
            raise RuntimeError("no version has been published yet")
        return self._version

    def _collect(self, run: GroupRun) -> None:
        if not self._keeps_media(run.work.step):
            run.media = None
        if signal_of(self.cfg).drops_flat_groups and self._signal.is_flat(run.scores):
            log.info("filtered: all takes have the same reward", extra={"group": run.group})
            self.ledger.filter(run.group)
            self._check_filtered(run.work.step)
        else:
            self._scored[run.group] = run

    def _keeps_media(self, step: int) -> bool:
        every = self.cfg.tracking.save_takes_every
        return every > 0 and (step + 1) % every == 0

    def _check_failures(self) -> None:
        if self.ledger.too_many_failures:
            count = self.ledger.failed_in_row
            raise RunFailed(
                f"{count} group{'s' if count > 1 else ''} in a row failed, each after "
                f"{self.cfg.faults.max_attempts} attempts (faults.max_failed_groups: "
                f"{self.cfg.faults.max_failed_groups}); the last one in {self.ledger.last_failure}"
            )

    def _check_filtered(self, step: int) -> None:
        filtered = self.ledger.filtered_by_step[step]
        if filtered >= _MAX_REFILLS * self.cfg.step.groups:
            raise RunFailed(
                f"step {step}: {filtered} groups had equal rewards in all takes and were filtered; "
                "check that the reward tells takes apart, raise sampler.noise_level, or set "
                "signal.zero_std=train"
            )

    # ------------------------------------------------------------------------------------------- steps

    async def chunks(self, learner_version: int) -> AsyncIterator[StepChunk]:
        """The batch of the next step in chunks (`group_plan.accumulation_chunks`), each as soon as it is scored; chunks
        that are scored by then too are joined to it.

        A chunk whose `lost` is set is yielded again once those groups have been drawn again. If one of them fails for
        good, another group takes its place, and the step begins again with a chunk at 0.
        """
        done: list[int] = []
        left = accumulation_chunks(self.cfg)
        while left:
            async with self._changed:
                while self.ledger.first(learner_version, left[0].stop) is None:
                    await self._changed.wait()
            scored = self.ledger.scored_first(learner_version)
            while len(left) > 1 and left[1].stop <= scored:
                left[:2] = [range(left[0].start, left[1].stop)]
            places = left[0]
            so_far = [self._scored[group] for group in self.ledger.first(learner_version, places.stop) or ()]
            if [run.group for run in so_far[: places.start]] != done:
                done, left = [], accumulation_chunks(self.cfg)
                continue
            chunk = StepChunk(places.start, so_far[places.start :], so_far, last=len(left) == 1)
            yield chunk
            if chunk.lost:
                self._draw_again(chunk.lost)
            else:
                done = [run.group for run in so_far]
                del left[0]

    def _draw_again(self, groups: list[int]) -> None:
        """Their node died between scoring and training."""
        for group in groups:
            run = self._scored.pop(group)
            self.ledger.lost(group)
            reason = f"group {group}: its trajectory was lost with its node"
            assert self._tasks is not None  # a group has been scored
            self._tasks.create_task(self._run_group(run, lost=reason))

    def signal(self, runs: list[GroupRun]) -> SignalResult:
        """What the groups teach."""
        return self._signal.step([run.scores for run in runs])

    def consumed(self, runs: list[GroupRun], learner_version: int) -> None:
        """The learner has trained on `runs`; their data is freed."""
        self.ledger.trained([run.group for run in runs], learner_version)
        for run in runs:
            del self._scored[run.group]
            run.trajectory = None
        self._signal.commit()
        self._state_at_last_step = self._state()

    async def published(self, version: PolicyVersion) -> None:
        """Groups are drawn with `version` from now on."""
        async with self._changed:
            self.ledger.publish(version.number)
            self._version = version
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------- state

    def _state(self) -> dict[str, Any]:
        """A snapshot: later changes do not show in it."""
        return {
            "cursor": self._cursor.state(),
            "ledger": self.ledger.state(),
            "rewards": self._signal.state(),
        }

    def state(self) -> dict[str, Any]:
        """As of the last completed step; groups admitted since are admitted again by the resumed run."""
        return self._state_at_last_step

    def load_state(self, state: dict[str, Any]) -> None:
        self._cursor.load_state(state["cursor"])
        self.ledger.load_state(state["ledger"])
        self._signal.load_state(state.get("rewards"))
        self._waiting = sorted((group.step, group.id) for group in self.ledger.groups.values())
        self._state_at_last_step = self._state()

    @property
    def takes(self) -> int:
        """Training takes that reached an end, failed groups apart."""
        ended = self.ledger.ended
        return (sum(ended.values()) - ended[FAILED]) * self.cfg.step.takes
