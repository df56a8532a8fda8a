"""The loop of a run.

    evaluate -> checkpoint -> [rollout -> reward -> advantages -> learner -> publish] -> ...

It asks the other actors for everything and passes references on; frames and latents never enter this process, except
the few takes that are kept as files. When the learner is lost, a new one starts from the last checkpoint, and this loop
goes back there with it: nothing of the steps since is kept.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from actors.batch_builder import BatchBuilder
from actors.dispatcher import Dispatcher, Job
from actors.evaluation import Evaluator
from actors.learner_group import LearnerGroup, LearnerLost
from actors.policy_versions import Publisher
from actors.ray_errors import describe
from actors.ray_options import RunContext
from actors.step_recorder import Recent, Recorder
from actors.worker_pool import WorkerSlot, together
from pipeline.core.errors import RunFailed, RushesError
from pipeline.core.prompts import load_prompts
from pipeline.rl import group_plan
from pipeline.rl.objectives import get_objective
from pipeline.rl.on_policy import check_on_policy
from pipeline.runs import checkpoint
from pipeline.runs.tracking import drop_metrics_since

log = logging.getLogger("rushes.loop")


class Stopped(Exception):
    """The run was asked to stop; ends the loop between steps."""


class TrainLoop:
    """One run, from the start of its actors to the export. Lives in the controller's event loop."""

    def __init__(self, ctx: RunContext, resume_from: str | None, stop_asked: asyncio.Event) -> None:
        cfg = ctx.cfg
        self.ctx, self.cfg, self._resume_from, self._stop_asked = ctx, cfg, resume_from, stop_asked
        self._fatal: asyncio.Future = asyncio.get_running_loop().create_future()
        self._state, self._version, self._saved_step = "starting", 0, -1
        self._recorder: Recorder | None = None
        self._prompts = load_prompts(cfg.prompts.train)
        heldout = load_prompts(cfg.prompts.heldout) if cfg.prompts.heldout is not None else []
        self._learner = LearnerGroup(ctx)
        self._publisher = Publisher(self._learner)
        self._flow = Dispatcher(ctx, self._publisher, self._fatal, self._prompts[:3])
        self._training = BatchBuilder(cfg, self._flow, self._prompts)
        self._pump: asyncio.Task | None = None
        self._evaluator = Evaluator(ctx, self._flow, heldout)
        self._furthest, self._losses = -1, 0  # of the learner: version at the last loss, and losses since it rose

    @property
    def _slots(self) -> list[WorkerSlot]:
        return [slot for pool in self._flow.pools for slot in pool.slots] + self._learner.slots

    def snapshot(self, since: int) -> dict[str, Any]:
        slots = self._slots
        recent = self._recorder.recent if self._recorder is not None else Recent()
        return {
            "host": socket.gethostname(),
            "state": "stopping" if self._stop_asked.is_set() else self._state,
            "step": self._version,
            "steps": self.cfg.run.steps,
            "records": recent.after(since),
            "recorded": recent.count,
            "evals": self._evaluator.records,
            "eval_progress": self._evaluator.progress,
            "roles": {slot.name: slot.doing for slot in slots},
            "pids": {slot.name: slot.info["pid"] for slot in slots if slot.info},
            "counts": self._training.ledger.counts(),
            "queues": {queue.name: len(queue) for queue in self._flow.queues},
            "pools": {pool.name: pool.state() for pool in self._flow.pools},
        }

    async def scale(self, targets: dict[str, int]) -> dict[str, str]:
        return await self._flow.tender.scale(targets)

    # ------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Starts all actors; a resumed run continues where its checkpoint was. Raises `RushesError`."""
        if self._resume_from is not None:
            saved = checkpoint.read_state(Path(self._resume_from))["controller"]
            self._version = self._saved_step = saved["version"]
            self._training.load_state(saved["training"])
            self._evaluator.records = saved["evals"]
        await self._guard(together(self._learner.start(self._resume_from), self._flow.start()))
        self._check_version()
        # Only now, when everything has come up, are the lines after the checkpoint dropped.
        drop_metrics_since(self.ctx.run.path, self._version + 1)
        self._evaluator.write()
        self._recorder = Recorder(self.ctx, self._flow, self._fatal)
        await self._surviving(self._go_on)
        log.info("started at step %d of %d", self._version, self.cfg.run.steps)

    async def finish(self, status: str) -> dict[str, Any]:
        """Exports a finished run. Returns the facts of the run for its summary."""
        counts = self._training.ledger.counts()
        result: dict[str, Any] = {
            "status": status,
            "step": self._version,
            "evals": self._evaluator.records,
            "groups": {key: counts[key] for key in ("admitted", "trained", "filtered", "failed")},
            "takes": self._training.takes,
            "retries": self._training.ledger.retries,
            "peaks": await self._peaks(),
            "checkpoint": None,
        }
        if self._saved_step >= 0:
            result["checkpoint"] = str(checkpoint.folder_of(self.ctx.run.checkpoints, self._saved_step))
        if status == "finished":
            self._state = "exporting"
            await self._flow.stop()  # their memory is free for the export
            self._pump = None
            export = str(self.ctx.run.export)
            result["export"] = await self._surviving(lambda: self._of_learner(self._learner.ask("export", export)))
        return result

    async def _peaks(self) -> dict[str, int]:
        """Each actor's own peak of resident memory, in bytes, by name."""
        slots = self._slots
        asked = [asyncio.wait_for(slot.actor.info.remote(), 5) for slot in slots if slot.info]
        infos = await asyncio.gather(*asked, return_exceptions=True)  # one that is busy does not answer
        return {info["name"]: info["peak_rss"] for info in infos if isinstance(info, dict)}

    async def close(self) -> None:
        await self._flow.stop()
        self._learner.stop()
        if self._recorder is not None:
            await self._recorder.close()

    # ------------------------------------------------------------------------------------------- the loop

    async def run(self) -> None:
        """Until run.steps is reached. Raises `Stopped` between steps when asked to."""
        await self._surviving(self._advance)

    async def _advance(self) -> None:
        while True:
            if self._evaluator.due(self._version):
                await self._evaluate()
            every = self.cfg.checkpoint.every
            if every and self._version and self._version % every == 0:
                await self.save_if_new()
            if self._version >= self.cfg.run.steps:
                break
            await self._step()
        await self.save_if_new()

    async def _evaluate(self) -> None:
        self._state = "evaluating"
        await self._training.pause(True)
        if self._evaluator.tag == "train":
            version = self._training.version()
        else:  # the workers go back to the training weights with their next training group
            version = await self._of_learner(self._publisher.fetch(self._evaluator.tag))
        record = await self._guard(self._evaluator.run(version))
        self._record.evaluation(record, self._evaluator.media)

    @property
    def _record(self) -> Recorder:
        assert self._recorder is not None  # set by `start`
        return self._recorder

    async def _step(self) -> None:
        """One optimisation step, from the groups' rollout to the published version."""
        started = time.perf_counter()
        self._state = "training"
        await self._training.pause(False)
        jobs, metrics, answer, learned = await self._learn()
        metrics |= answer["metrics"]
        staleness = max(self._version - job.meta.version for job in jobs)
        if staleness == 0:
            devices = {
                str(slot.info["device"]) for slot in [*self._flow.rollouts.slots, *self._learner.slots] if slot.info
            }
            replay_error = metrics[get_objective(self.cfg.algorithm.objective).replay_metric]
            check_on_policy(self.cfg, self._version, replay_error, devices)
        self._training.consumed(jobs, self._version)
        self._version = answer["version"]
        await self._publish()
        sync = self._publisher.drain_sync()
        metrics |= self._record.times(jobs, time.perf_counter() - started, learned, sync)
        metrics["staleness/max"] = float(staleness)
        self._record.step(self._version, metrics, jobs, self._training.ledger)

    async def _learn(self) -> tuple[list[Job], dict[str, float], dict[str, Any], float]:
        """The step's jobs, in order; metrics of their rewards; the learner's last answer; the seconds it was busy.

        It begins with the first groups that are scored, while others are still drawn, goes on with all that have been
        scored meanwhile (the result is the same: `Learner.train_step`), and waits with its update for the last. If it
        is lost, what it has added up is lost with it, and `_recover` begins the step again.
        """
        jobs: list[Job] = []
        portions, busy = group_plan.accumulation_chunks(self.cfg), 0.0
        while portions:
            places = portions[0]
            await self._guard(self._training.first(self._version, places.stop))
            while len(portions) > 1 and portions[1].stop <= self._training.scored_first(self._version):
                places = portions[0] = range(places.start, portions.pop(1).stop)  # these are scored too by now
            scored = await self._guard(self._training.first(self._version, places.stop))
            if [job.group for job in scored[: places.start]] != [job.group for job in jobs]:
                jobs, portions = (
                    [],
                    group_plan.accumulation_chunks(self.cfg),
                )  # one has failed for good since: another has its place
                continue
            new = scored[places.start :]
            advantages = self._training.advantages(new).advantages
            items = [(job.group, job.trajectory, advantages[i], job.meta.micro_batches) for i, job in enumerate(new)]
            began, last = time.perf_counter(), len(portions) == 1
            call = asyncio.ensure_future(self._learner.ask("train_step", items, places.start, last))
            if last:
                await asyncio.sleep(0)  # the call is on its way: nothing waits for what is computed here
                metrics = self._training.advantages(scored).metrics
            answer = await self._of_learner(call)
            busy += time.perf_counter() - began
            if "lost" in answer:
                await self._training.trajectories_lost(answer["lost"])
                continue
            jobs = scored
            del portions[0]
        return jobs, metrics, answer, busy

    async def _publish(self) -> None:
        await self._training.published(await self._of_learner(self._publisher.fetch("train")))

    # ------------------------------------------------------------------------------------------- checkpoints

    async def save_if_new(self) -> None:
        """A checkpoint of the last completed step, unless there is one. Raises `CheckpointError`."""
        if self._saved_step == self._version or not self._learner.alive:
            return
        self._state = "saving"
        if self._recorder is not None:
            await self._recorder.flush()  # metrics of the steps it covers are on disk first
        controller = {
            "version": self._version,
            "training": self._training.state(),
            "evals": self._evaluator.records,
        }
        where, keep = str(self.ctx.run.checkpoints), self.cfg.checkpoint.keep
        folder = await self._of_learner(self._learner.ask("save", where, controller, keep))
        self._saved_step = self._version
        log.info("saved %s", folder)

    async def save_and_stop(self) -> None:
        """The run was asked to stop: its last completed step is saved, if the learner still lives."""
        try:
            await self.save_if_new()
        except LearnerLost as error:
            log.error("no checkpoint could be saved: %s", error)
        if self._saved_step != self._version:  # what is not saved has not been done
            self._version = max(self._saved_step, 0)

    async def rescue(self) -> None:
        """Keeps the completed steps of a run that a worker's failure ends. After a failure of the learner itself, or
        of this loop, its state is not to be trusted: the last checkpoint counts. Never hides the first failure."""
        if not self._fatal.done() or self._version == 0:
            return
        self._fatal = asyncio.get_running_loop().create_future()
        try:
            await self.save_if_new()
        except RushesError as error:
            log.error("no checkpoint could be saved: %s", error)

    # ------------------------------------------------------------------------------------------- loss of the learner

    async def _surviving(self, action: Callable[[], Awaitable[Any]]) -> Any:
        """`action`, begun again after every loss of the learner that a restart could mend."""
        while True:
            try:
                return await action()
            except LearnerLost as error:
                lost = error
            while True:
                try:
                    await self._recover(lost)
                    break
                except LearnerLost as error:
                    lost = error

    async def _recover(self, error: LearnerLost) -> None:
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
        self._state = "restarting the learner"
        self._training.retire()
        if self._pump is not None:
            self._pump.cancel()
        self._learner.kill()
        folder = await asyncio.to_thread(checkpoint.latest, self.ctx.run.checkpoints)
        saved = checkpoint.read_state(folder)["controller"] if folder is not None else None
        back_to = saved["version"] if saved is not None else 0
        log.warning(
            "%s; starting it again from %s (loss %d of %d)", error, folder or "the beginning", self._losses, allowed
        )
        self._saved_step, self._version = (back_to if saved is not None else -1), back_to
        await self._guard(self._learner.start(str(folder) if folder is not None else None))
        self._check_version()
        await self._record.flush()
        drop_metrics_since(self.ctx.run.path, back_to + 1)
        self._evaluator.records = [record for record in self._evaluator.records if record["step"] <= back_to]
        self._evaluator.write()
        self._training = BatchBuilder(self.cfg, self._flow, self._prompts)
        if saved is not None:
            self._training.load_state(saved["training"])
        if self._pump is not None:  # else the workers have gone already
            await self._go_on()

    def _check_version(self) -> None:
        held = {slot.info["version"] for slot in self._learner.slots}
        if held != {self._version}:
            raise RunFailed(
                f"{self._learner.main.place}: is at version {held.pop()} after the start, not {self._version}"
            )

    async def _go_on(self) -> None:
        """Publishes the learner's version and lets groups be admitted."""
        await self._publish()
        self._pump = self._flow.background(self._training.pump())

    # ------------------------------------------------------------------------------------------- helpers

    async def _of_learner(self, awaitable: Awaitable[Any]) -> Any:
        """Never abandoned half-way by a stop: a learner call is finished or has failed."""
        return await self._guard(awaitable, stoppable=False)

    async def _guard(self, awaitable: Awaitable[Any], stoppable: bool = True) -> Any:
        """Waits for `awaitable`; ends early with a background failure or, if `stoppable`, with `Stopped`."""
        task = asyncio.ensure_future(awaitable)
        stop = asyncio.ensure_future(self._stop_asked.wait())
        try:
            watched = {task, self._fatal} | ({stop} if stoppable else set())
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self._fatal.done():
                raise self._as_run_failed(self._fatal.exception())
            raise Stopped
        finally:
            stop.cancel()

    def _as_run_failed(self, error: BaseException | None) -> RushesError:
        if isinstance(error, RushesError):
            return error
        assert error is not None  # the future only ever gets exceptions
        return RunFailed(f"controller: {describe(error)} (see {self.ctx.run.log})")
