"""The loop of a run.

    evaluate ──► checkpoint ──► step: chunks of scored groups ──► learner ──► publish the new policy version ──► ...

train       consumes    scored chunks from the `BatchBuilder`, one step after the other
            waits for   the next chunk, the learner
            unblocked   by groups that are scored; ended by `run.steps`, or a stop

All computing is done by other actors; this process passes references on. Frames and latents never enter it, except the
few takes that are kept as files. When the learner is lost, a new one starts from the last checkpoint, and the loop
goes back to it: the training groups on their way are cancelled and admitted again with the same ids and seeds.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from actors.batch_builder import BatchBuilder, StepChunk
from actors.dispatcher import Dispatcher
from actors.evaluation import Evaluator
from actors.group_run import GroupRun
from actors.learner_group import LearnerGroup, LearnerLost
from actors.learner_rank import TrainStepResult
from actors.ray_options import RunContext
from actors.step_recorder import Recent, Recorder
from actors.tasks import cancel
from actors.worker_slot import WorkerSlot
from pipeline.core.errors import RunFailed, RushesError
from pipeline.core.prompts import load_prompts
from pipeline.core.types import PolicyVersion
from pipeline.rl.objectives import objective_of
from pipeline.rl.on_policy import check_on_policy
from pipeline.rl.sources import source_of
from pipeline.runs import checkpoint
from pipeline.runs.snapshot import RunSnapshot

T = TypeVar("T")
log = logging.getLogger("rushes.loop")


class Stopped(Exception):
    """The run was asked to stop; ends the loop between steps."""


@dataclass
class LearnerStep:
    """What the learner made of one step."""

    runs: list[GroupRun]  # the batch, in id order
    metrics: dict[str, float]  # of the rewards and of the learner
    version: int  # after it
    seconds: float  # that the learner was busy


class TrainLoop:
    """One run, from the start of its actors to the export. Lives in the controller's event loop.

    Background tasks belong to the task group that `start` is given, whose first failure cancels the loop.
    """

    def __init__(self, ctx: RunContext, resume_from: str | None, stop_asked: asyncio.Event) -> None:
        cfg = ctx.cfg
        self.ctx, self.cfg, self._resume_from, self._stop_asked = ctx, cfg, resume_from, stop_asked
        self._phase, self._version, self._saved_step = "starting", 0, -1
        self._recorder: Recorder | None = None
        self._rollout_policy = objective_of(cfg).requirements.rollout_policy
        self._prompts = list(source_of(cfg).rows(cfg))
        heldout = load_prompts(cfg.prompts.heldout) if cfg.prompts.heldout is not None else []
        self._learner = LearnerGroup(ctx)
        self._dispatcher = Dispatcher(ctx, self._prompts[:3], resumed=resume_from is not None)
        self._builder = BatchBuilder(cfg, self._dispatcher, self._prompts)
        self._evaluator = Evaluator(ctx, self._dispatcher, heldout)
        self._background: asyncio.TaskGroup | None = None
        self._dispatching: asyncio.Task | None = None  # None: not started, or ended for the export
        self._building: asyncio.Task | None = None  # None: admission has not begun, or has ended for the export
        self._watching: asyncio.Task | None = None
        self._sync_s = 0.0  # spent on publishing, in the present step
        self._furthest, self._losses = -1, 0  # of the learner: version at the last loss, and losses since it rose

    @property
    def _slots(self) -> list[WorkerSlot]:
        return [slot for pool in self._dispatcher.pools for slot in pool.slots] + self._learner.slots

    def snapshot(self, since: int) -> RunSnapshot:
        recent = self._recorder.recent if self._recorder is not None else Recent()
        pools = self._dispatcher.pools
        return RunSnapshot(
            state="stopping" if self._stop_asked.is_set() else self._phase,
            step=self._version,
            steps=self.cfg.run.steps,
            records=recent.after(since),
            recorded=recent.count,
            evals=self._evaluator.shown_records,
            eval_progress=self._evaluator.progress,
            host=socket.gethostname(),
            activities={slot.name: slot.activity for slot in self._slots},
            pids={slot.name: slot.info["pid"] for slot in self._slots if slot.alive},
            queues={pool.name: len(pool.backlog) for pool in pools},
            pools={pool.name: pool.summary() for pool in pools},
        )

    def scale(self, targets: dict[str, int]) -> dict[str, str]:
        if self._dispatching is None:
            raise RushesError("the run has no workers at the moment: it is starting, or at its end")
        return self._dispatcher.supervisor.scale(targets)

    # ------------------------------------------------------------------------------------------- start and end

    async def start(self, background: asyncio.TaskGroup) -> None:
        """Starts all actors; a resumed run continues where its checkpoint was. Raises `RushesError`."""
        self._background = background
        if self._resume_from is not None:
            saved = checkpoint.read_state(Path(self._resume_from))["controller"]
            self._version = self._saved_step = saved["version"]
            self._builder.load_state(saved["training"])
            self._evaluator.records = saved["evals"]
        self._dispatching = background.create_task(self._dispatcher.run())
        await self._unless_stopped(self._all_ready())
        self._check_version()
        self._recorder = Recorder(self.ctx, self._dispatcher.pools)
        if self._resume_from is not None:  # only now, when everything has come up
            await self._recorder.rewind(self._version + 1)
        self._evaluator.write()
        self._watching = background.create_task(self._recorder.watch())
        await self._with_learner_recovery(self._resume_admission)
        log.info("started at step %d of %d", self._version, self.cfg.run.steps)

    async def _all_ready(self) -> None:
        async with asyncio.TaskGroup() as starting:
            starting.create_task(self._learner.start(self._resume_from))
            starting.create_task(self._dispatcher.ready())

    async def finish(self, status: str) -> dict[str, Any]:
        """Exports a finished run. Returns the facts of the run for its summary."""
        ledger = self._builder.ledger
        counts = ledger.counts()
        result: dict[str, Any] = {
            "status": status,
            "step": self._version,
            "evals": self._evaluator.records,
            "groups": {key: counts[key] for key in ("admitted", "trained", "filtered", "failed")},
            "takes": self._builder.takes,
            "retries": ledger.retries,
            "peaks": await self._peaks(),
            "checkpoint": None,
            "ended": self._evaluator.ended,
        }
        if self._saved_step >= 0:
            result["checkpoint"] = str(checkpoint.folder_of(self.ctx.run.checkpoints, self._saved_step))
        if status == "finished":
            self._phase = "exporting"
            await self._end_workers()  # their memory is free for the export
            result["exported_step"] = step = self._evaluator.exported_step(self._version)
            source = None if step == self._version else checkpoint.folder_of(self.ctx.run.checkpoints, step)
            export = functools.partial(self._learner.export, self.ctx.run.export, source)
            result["export"] = await self._with_learner_recovery(export)
        if self._recorder is not None:
            result["missing"] = await self._recorder.close()
        return result

    async def _peaks(self) -> dict[str, int]:
        """Each actor's own peak of resident memory, in bytes, by name."""
        calls = [asyncio.wait_for(slot.actor.info.remote(), 5) for slot in self._slots if slot.alive]
        infos = await asyncio.gather(*calls, return_exceptions=True)  # one that is busy does not answer
        return {info["name"]: info["peak_rss"] for info in infos if isinstance(info, dict)}

    async def _end_workers(self) -> None:
        await cancel(self._building)
        await cancel(self._dispatching)
        self._building = self._dispatching = None

    async def end_background(self) -> None:
        """Ends all background tasks; nothing is left to do."""
        await self._end_workers()
        await cancel(self._watching)

    async def close(self) -> None:
        """Ends the learner and finishes writing metrics."""
        self._learner.stop()
        if self._recorder is not None:
            await self._recorder.close()

    # ------------------------------------------------------------------------------------------- the loop

    async def run(self) -> None:
        """Until run.steps is reached. Raises `Stopped` between steps when asked to."""
        await self._with_learner_recovery(self._train)

    async def _train(self) -> None:
        while True:
            if self._evaluator.due(self._version):
                await self._evaluate()
            every = self.cfg.checkpoint.every
            if every and self._version and self._version % every == 0:
                await self.save_if_new()
            if self._version >= self.cfg.run.steps or self._evaluator.ended:
                break
            await self._train_step()
        await self.save_if_new()

    async def _evaluate(self) -> None:
        self._phase = "evaluating"
        await self._builder.pause(True)
        if self._evaluator.tag == self._rollout_policy:
            version = self._builder.version
        else:  # the workers go back to the weights of training rollouts with their next training group
            version = await self._fetch_version(self._evaluator.tag)
        try:
            record = await self._unless_stopped(self._evaluator.run(version))
        except RunFailed:
            await self.rescue()  # the workers failed, the learner is sound
            raise
        self._record.evaluation(record, self._evaluator.media, self._evaluator.captions)
        if self._evaluator.best_step == self._version:
            await self.save_if_new()

    @property
    def _record(self) -> Recorder:
        assert self._recorder is not None  # set by `start`
        return self._recorder

    async def _train_step(self) -> None:
        """One optimisation step, from the groups' rollout to the published version."""
        started = time.perf_counter()
        self._phase = "training"
        await self._builder.pause(False)
        step = await self._accumulate_gradients()
        staleness = max(run.staleness(self._version) for run in step.runs)
        replay_error = step.metrics.get(objective_of(self.cfg).requirements.replay_metric)
        if staleness == 0 and replay_error is not None:  # None: the turn of a group of data, which nothing drew
            slots = [*self._dispatcher.rollouts.slots, *self._learner.slots]
            devices = {str(slot.info["device"]) for slot in slots if slot.alive}
            check_on_policy(self.cfg, self._version, replay_error, devices)
        self._builder.consumed(step.runs, self._version)
        self._version = step.version
        await self._publish()
        metrics = step.metrics | self._times(step, time.perf_counter() - started)
        metrics["staleness/max"] = float(staleness)
        self._record.step(self._version, metrics, step.runs, self._builder.ledger)

    def _times(self, step: LearnerStep, step_s: float) -> dict[str, float]:
        sync_s, self._sync_s = max(self._sync_s, self._dispatcher.drain_load_s()), 0.0
        self._dispatcher.step_finished(step_s)
        return self._record.times(step.runs, step_s, step.seconds, sync_s)

    async def _accumulate_gradients(self) -> LearnerStep:
        """The learner begins with the first chunk that is scored, while other groups are still drawn, and updates the
        policy after the last one. If it is lost, its gradients are lost with it, and the step begins again."""
        busy = 0.0
        chunks = self._builder.chunks(self._version)
        while True:
            chunk: StepChunk = await self._unless_stopped(anext(chunks))
            feedback = self._builder.signal(chunk.runs).feedback
            groups = [run.batch(each, self._version) for run, each in zip(chunk.runs, feedback, strict=True)]
            began = time.perf_counter()
            call = asyncio.ensure_future(self._learner.train_step(groups, chunk.start, chunk.last))
            reward_metrics: dict[str, float] = {}
            if chunk.last:
                await asyncio.sleep(0)  # the call is on its way: nothing waits for what is computed here
                reward_metrics = self._builder.signal(chunk.so_far).metrics
            result: TrainStepResult = await call
            busy += time.perf_counter() - began
            chunk.lost = [chunk.runs[position].group for position in result.lost]
            if chunk.last and not chunk.lost:
                return LearnerStep(chunk.so_far, reward_metrics | result.metrics, result.version, busy)

    async def _publish(self) -> None:
        """Groups are drawn with the learner's present weights from now on."""
        await self._builder.published(await self._fetch_version(self._rollout_policy))

    async def _fetch_version(self, tag: Any) -> PolicyVersion:
        started = time.perf_counter()
        version = await self._learner.policy_version(tag)
        self._sync_s += time.perf_counter() - started
        return version

    # ------------------------------------------------------------------------------------------- checkpoints

    async def save_if_new(self) -> None:
        """A checkpoint of the last completed step, unless there is one. Raises `CheckpointError`."""
        if self._saved_step == self._version or not self._learner.alive:
            return
        self._phase = "saving"
        if self._recorder is not None:
            await self._recorder.flush()  # metrics of the steps it covers are on disk first
        controller = {
            "version": self._version,
            "training": self._builder.state(),
            "evals": self._evaluator.records,
        }
        best = self._evaluator.best_step
        folder = await self._learner.save(self.ctx.run.checkpoints, controller, self.cfg.checkpoint.keep, best)
        self._saved_step = self._version
        log.info("saved %s", folder)

    async def save_and_stop(self) -> None:
        """The run was asked to stop: its last completed step is saved, if the learner still lives."""
        try:
            await self.save_if_new()
        except LearnerLost as error:
            log.error("no checkpoint could be saved: %s", error)
        if self._saved_step != self._version:  # unsaved steps are lost
            self._version = max(self._saved_step, 0)

    async def rescue(self) -> None:
        """Keeps the completed steps of a run that a background failure has ended: a worker's, or a file's. After a
        failure of the learner or of this loop, its state is not to be trusted: the last checkpoint counts. Never hides
        the first failure."""
        if self._version == 0:
            return
        try:
            await self.save_if_new()
        except RushesError as error:
            log.error("no checkpoint could be saved: %s", error)

    # ------------------------------------------------------------------------------------------- loss of the learner

    async def _with_learner_recovery(self, action: Callable[[], Awaitable[T]]) -> T:
        """`action`, begun again after every loss of the learner that a restart can repair."""
        lost: LearnerLost | None = None
        while True:
            try:
                if lost is not None:
                    await self._restore_learner(lost)
                    lost = None
                return await action()
            except LearnerLost as error:
                lost = error

    async def _restore_learner(self, error: LearnerLost) -> None:
        """A new learner from the last checkpoint (from the beginning, if there is none), and the run back to there.

        Groups admitted since are admitted again, with the same ids and seeds. Raises `RunFailed` when the learner has
        been lost more than `faults.max_restarts` times without getting further.
        """
        if self._version > self._furthest:
            self._furthest, self._losses = self._version, 0
        self._losses += 1
        allowed = self.cfg.faults.max_restarts
        if self._losses > allowed:
            raise RunFailed(
                f"{error} (lost {self._losses} times without getting beyond step {self._furthest}; "
                f"faults.max_restarts: {allowed}); continue with --resume"
            ) from error
        self._phase = "restarting the learner"
        await cancel(self._building)
        self._learner.kill()
        folder = await asyncio.to_thread(checkpoint.latest, self.ctx.run.checkpoints, writing=True)
        saved = checkpoint.read_state(folder)["controller"] if folder is not None else None
        back_to = saved["version"] if saved is not None else 0
        log.warning(
            "%s; starting it again from %s (loss %d of %d)", error, folder or "the beginning", self._losses, allowed
        )
        self._saved_step, self._version = (back_to if saved is not None else -1), back_to
        await self._unless_stopped(self._learner.start(str(folder) if folder is not None else None))
        self._check_version()
        await self._record.rewind(back_to + 1)
        self._evaluator.records = [record for record in self._evaluator.records if record["step"] <= back_to]
        self._evaluator.write()
        self._builder = BatchBuilder(self.cfg, self._dispatcher, self._prompts)
        if saved is not None:
            self._builder.load_state(saved["training"])
        if self._building is not None:  # else admission has not begun, or the workers have gone already
            await self._resume_admission()

    def _check_version(self) -> None:
        held = {slot.info["version"] for slot in self._learner.slots}
        if held != {self._version}:
            raise RunFailed(
                f"{self._learner.main.place}: is at version {held.pop()} after the start, not {self._version}"
            )

    async def _resume_admission(self) -> None:
        """Publishes the learner's version and lets groups be admitted."""
        await self._publish()
        assert self._background is not None  # set by `start`
        self._building = self._background.create_task(self._builder.run())

    async def _unless_stopped(self, awaitable: Awaitable[T]) -> T:
        """Waits for `awaitable`, and cancels it with `Stopped` when the run is asked to stop. Learner calls are awaited
        without it: a stop never abandons them half-way."""
        task = asyncio.ensure_future(awaitable)
        stop = asyncio.ensure_future(self._stop_asked.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Stopped
        finally:
            stop.cancel()
            await cancel(task)
