"""The learner: gang-scheduled ranks that are started and called together. Any failure fails the group."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import exceptions as rx
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.heartbeat import BEAT_S, Pulse
from actors.learner_rank import LearnerActor, TrainStepResult
from actors.ray_errors import describe, is_deterministic, root
from actors.ray_options import MAX_START_S, RunContext, actor_env, cores, ray_resources
from actors.worker_slot import WorkerSlot, WorkerState
from pipeline.core.errors import RunFailed
from pipeline.core.types import GroupBatch, PolicyTag, PolicyVersion

MAX_WAIT_S = 1800.0  # for resources of the cluster; an autoscaled GPU node takes minutes
FIRST_WARNING_S, WARNING_EVERY_S = 2.0, 15.0  # while waiting
FIRST_SILENCE_S, SILENT_S = 30.0, 300.0  # without a heartbeat: a warning, and the end of the group
_COLLECT_ERRORS_S = 3.0  # when a rank dies the others fail too; wait this long for the error that explains theirs
log = logging.getLogger("rushes.learner")


class LearnerLost(RunFailed):
    """A rank died or failed; the group can be started again from a checkpoint."""


class LearnerGroup:
    """`slots[0]` is rank 0, which hands out weights, checkpoints and the export."""

    def __init__(self, ctx: RunContext) -> None:
        self.ctx, self.cfg = ctx, ctx.cfg.learner
        ranks = self.cfg.ranks
        self.slots = [WorkerSlot("learner" if ranks == 1 else f"learner-{rank}") for rank in range(ranks)]
        self._pulse = Pulse()
        self._placement_group: PlacementGroup | None = None
        self._needs = {name: amount for name, amount in self.cfg.resources.items() if amount > 0}

    @property
    def main(self) -> WorkerSlot:
        return self.slots[0]

    @property
    def alive(self) -> bool:
        """Whether all ranks have come up, and none is known to have died."""
        return all(slot.alive for slot in self.slots)

    # ------------------------------------------------------------------------------------------- start and end

    async def start(self, resume_from: str | None) -> None:
        """Starts all ranks, from a checkpoint or from the beginning; again when a process dies meanwhile, up to
        `faults.max_restarts` times. Raises the ranks' own `RushesError`, or `RunFailed`."""
        attempts = self.ctx.cfg.faults.max_restarts + 1
        for attempt in range(1, attempts + 1):
            try:
                await self._place()
                await self._start(resume_from)
                return
            except LearnerLost as error:
                self.kill()
                log.warning("the learner did not start (attempt %d of %d): %s", attempt, attempts, error)
                if attempt == attempts:
                    raise RunFailed(f"{error}, in {attempts} attempts (see {self.ctx.run.log})") from error
            except BaseException:
                self.kill()
                raise

    async def _place(self) -> None:
        """Reserves resources for all ranks at once: half a group would hold GPUs and compute nothing."""
        if not self._needs:
            return
        if self._placement_group is None:
            # Ray keeps it when this controller dies, until the job ends: the driver finds it by its name, used once.
            name = f"{self.ctx.run.name}/learner-placement-{uuid.uuid4().hex[:12]}"
            self._placement_group = placement_group([dict(self._needs)] * len(self.slots), strategy="PACK", name=name)
        await self._wait(self._placed(self._placement_group), self._waiting_for_resources, FIRST_WARNING_S)

    async def _placed(self, group: PlacementGroup) -> None:
        while not await asyncio.to_thread(group.wait, 1):
            continue

    async def _wait(self, awaitable: Awaitable[Any], activity: str, silent_s: float) -> Any:
        """Waits, with warnings after `silent_s`. Raises `RunFailed` after `MAX_WAIT_S`."""
        task, started = asyncio.ensure_future(awaitable), time.monotonic()
        for slot in self.slots:
            slot.activity = activity
        pause = min(silent_s, MAX_WAIT_S)
        try:
            while not (await asyncio.wait({task}, timeout=pause))[0]:
                pause = min(WARNING_EVERY_S, MAX_WAIT_S)
                left = MAX_WAIT_S - (time.monotonic() - started)
                if left <= 0:
                    raise RunFailed(
                        f"learner: no resources within {MAX_WAIT_S:g} s: {activity}; {_cluster(self._needs)}"
                    )
                log.warning("%s; %s; giving up in %.0f s", activity, _cluster(self._needs), left)
            return task.result()
        finally:
            task.cancel()

    @property
    def _waiting_for_resources(self) -> str:
        each = ", ".join(f"{name}: {amount:g}" for name, amount in self._needs.items())
        return f"waiting for {len(self.slots)} × {{{each}}}"

    async def _start(self, resume_from: str | None) -> None:
        threads = self.cfg.threads or max(1, cores() // len(self.slots))
        for rank, slot in enumerate(self.slots):
            slot.generation += 1
            slot.state, slot.activity = WorkerState.STARTING, "starting its process"
            suffix = f"#{slot.generation}" if slot.generation > 1 else ""
            options: dict[str, Any] = {
                "name": f"{self.ctx.run.name}/{slot.name}{suffix}",
                **ray_resources(self.cfg.resources),
                "max_restarts": 0,  # a restarted actor would lack its weights; the group starts as a whole
                "max_task_retries": 0,
                "runtime_env": {"env_vars": actor_env(threads)},
            }
            if self._placement_group is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._placement_group, rank)
            slot.handle = ray.remote(LearnerActor).options(**options).remote(self.ctx, slot.name)
        # A reserved node may have gone since: then Ray looks for another one.
        placed = self._all("starting", [slot.actor.info.remote() for slot in self.slots])
        infos = await self._wait(placed, f"starting {len(self.slots)} process(es)", WARNING_EVERY_S)
        for slot, info in zip(self.slots, infos, strict=True):
            slot.host, slot.activity = info["host"], "loading"
        on_node = Counter(info["node"] for info in infos)
        address = None
        if len(self.slots) > 1:
            address = (await self._all("starting", [self.main.actor.open_rendezvous.remote()]))[0]
        calls = [
            slot.actor.start.remote(resume_from, rank, address, on_node[info["node"]])
            for rank, (slot, info) in enumerate(zip(self.slots, infos, strict=True))
        ]
        try:
            async with asyncio.timeout(MAX_START_S):
                answers = await self._all("starting", calls)
        except TimeoutError:
            raise LearnerLost(f"{self.main.place}: starting took more than {MAX_START_S:.0f} s") from None
        for slot, info in zip(self.slots, answers, strict=True):
            slot.info = info
            slot.set_idle()
            log.info("%s is process %d on %s", slot.name, info["pid"], slot.host)

    def kill(self) -> None:
        """Ends all ranks; their resources stay reserved."""
        for slot in self.slots:
            slot.kill()

    def stop(self) -> None:
        """Ends all ranks and gives their resources back."""
        self.kill()
        if self._placement_group is not None:
            remove_placement_group(self._placement_group)
            self._placement_group = None
        for slot in self.slots:
            slot.activity = "stopped"

    # ------------------------------------------------------------------------------------------- calls

    # Each is made of every rank, and raises the ranks' `RushesError`, or `LearnerLost`.

    async def train_step(self, groups: list[GroupBatch], first: int, last: bool) -> TrainStepResult:
        """See `LearnerActor.train_step`."""
        return await self._call("train step", "train_step", groups, first, last)

    async def save(self, root: Path, controller: dict[str, Any], keep: int, best: int | None = None) -> str:
        """Writes checkpoint `root/step-<version>` with the controller's state; returns its path. Keeps the newest
        `keep`, and that of step `best`."""
        return await self._call("save", "save", str(root), controller, keep, best)

    async def export(self, out: Path, source: Path | None = None) -> str:
        """Writes the trained policy for plain diffusers; returns the path. `source`: a checkpoint whose weights are
        exported instead of the present ones."""
        return await self._call("export", "export", str(out), str(source) if source is not None else None)

    async def policy_version(self, tag: PolicyTag) -> PolicyVersion:
        """The present weights. Their reference is owned by this process, so they outlive the learner."""
        with self._busy("packing weights") as activity:
            calls = [slot.actor.weights.options(num_returns=2).remote(tag) for slot in self.slots]
            about = (await self._all(activity, [about for about, _ in calls]))[0]
        return PolicyVersion(number=about["number"], tag=tag, checksum=about["checksum"], weights=calls[0][1])

    async def _call(self, activity: str, method: str, *args: Any) -> Any:
        """Rank 0's answer."""
        with self._busy(activity):
            answers = await self._all(activity, [getattr(slot.actor, method).remote(*args) for slot in self.slots])
        return answers[0]

    @contextlib.contextmanager
    def _busy(self, activity: str) -> Iterator[str]:
        if not self.alive:
            raise LearnerLost(f"{self.main.place}: {activity} failed: it is not running")
        for slot in self.slots:
            slot.state, slot.activity = WorkerState.BUSY, activity
        yield activity
        for slot in self.slots:
            slot.set_idle()

    async def _check_alive(self, activity: str) -> None:
        """Raises `LearnerLost` when a rank has shown no sign of life for `SILENT_S`."""
        for slot in self.slots:
            if slot.handle is None:
                continue
            silent_s = await asyncio.to_thread(self._pulse.silent_s, slot.handle._actor_id.hex())
            if silent_s >= SILENT_S:
                for each in self.slots:
                    each.state = WorkerState.DEAD
                raise LearnerLost(
                    f"{slot.place}: {activity} failed: no sign of life for {silent_s:.0f} s (its process is stopped, "
                    "or its node hangs)"
                )
            if silent_s >= FIRST_SILENCE_S:
                log.warning("%s: %s: no sign of life for %.0f s; giving up after %.0f s",
                            slot.place, activity, silent_s, SILENT_S)  # fmt: skip

    async def _all(self, activity: str, calls: Sequence[ray.ObjectRef]) -> list[Any]:
        """All answers; `calls` are in rank order. As soon as a rank fails, raises its `RushesError`, or `LearnerLost`
        with the failure that explains the others', after which no rank counts as alive."""
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            while not _settled(tasks):
                await asyncio.wait(tasks, timeout=BEAT_S, return_when=asyncio.FIRST_EXCEPTION)
                if not _settled(tasks):
                    await self._check_alive(activity)
            if any(task.done() and task.exception() for task in tasks):
                await asyncio.wait(tasks, timeout=_COLLECT_ERRORS_S)
            failed = [(slot, task.exception()) for slot, task in zip(self.slots, tasks, strict=False) if task.done()]
            errors = [(slot, error) for slot, error in failed if error is not None]
        finally:
            for task in tasks:
                task.cancel()
        if not errors:
            return [task.result() for task in tasks]
        slot, error = min(errors, key=lambda pair: _distance_from_cause(pair[1]))
        if is_deterministic(error):
            raise root(error) from None  # as it was raised, out of Ray's wrappers
        for each in self.slots:
            each.state = WorkerState.DEAD
        raise LearnerLost(f"{slot.place}: {activity} failed: {describe(error)}") from error


def _settled(tasks: Sequence[asyncio.Future]) -> bool:
    """Whether all have answered, or one has failed."""
    return all(task.done() for task in tasks) or any(task.done() and task.exception() for task in tasks)


def _distance_from_cause(error: BaseException) -> int:
    """0: a rank's own verdict. 1: a death. 2: what follows from either: the other ranks only lose a connection."""
    return 0 if is_deterministic(error) else 1 if isinstance(error, rx.RayActorError) else 2


def _cluster(needs: Iterable[str]) -> str:
    """`the cluster has CPU 2 (0.5 free), GPU 0`."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return "the cluster has " + ", ".join(f"{n} {total.get(n, 0):g} ({free.get(n, 0):g} free)" for n in needs)
