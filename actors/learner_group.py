"""The learner's ranks as one: placed together, started together, called together, and lost together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
from ray import exceptions as rx
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.learner_rank import LearnerActor, TrainGroup, TrainStepResult
from actors.ray_errors import describe, is_deterministic, root
from actors.ray_options import MAX_START_S, RunContext, actor_env, cores, ray_resources
from actors.worker_slot import WorkerSlot, WorkerState
from pipeline.core.errors import RunFailed
from pipeline.core.types import PolicyVersion

MAX_WAIT_S = 1800.0  # for room in the cluster; an autoscaled GPU node takes minutes
FIRST_SAID_S, SAY_EVERY_S = 2.0, 15.0  # while waiting
_WHO_DIED_S = 3.0  # the others fail when a rank dies; wait this long to see which one it was
log = logging.getLogger("rushes.learner")


class LearnerLost(RunFailed):
    """A rank died or failed; the group can be started again from a checkpoint."""


class LearnerGroup:
    """`slots[0]` is rank 0, which hands out weights, checkpoints and the export."""

    def __init__(self, ctx: RunContext) -> None:
        self.ctx, self.cfg = ctx, ctx.cfg.learner
        ranks = self.cfg.ranks
        self.slots = [WorkerSlot("learner" if ranks == 1 else f"learner-{rank}") for rank in range(ranks)]
        self._room: PlacementGroup | None = None
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
        """All ranks, from a checkpoint or from the beginning. A start during which a process dies is repeated, up to
        `faults.max_restarts` times. Raises the ranks' own `RushesError`, or `RunFailed`."""
        attempts = self.ctx.cfg.faults.max_restarts + 1
        for attempt in range(1, attempts + 1):
            try:
                await self._place()
                await self._start(resume_from)
                return
            except LearnerLost as error:
                self.kill()
                log.warning("the learner did not start (try %d of %d): %s", attempt, attempts, error)
                if attempt == attempts:
                    raise RunFailed(f"{error}, in {attempts} tries (see {self.ctx.run.log})") from error
            except BaseException:
                self.kill()
                raise

    async def _place(self) -> None:
        """Reserves room for all ranks at once: half a group would hold GPUs and compute nothing."""
        if not self._needs:
            return
        if self._room is None:
            # Ray keeps it when this controller dies, until the job ends: the driver finds it by its name, used once.
            name = f"{self.ctx.run.name}/learner-room-{uuid.uuid4().hex[:12]}"
            self._room = placement_group([dict(self._needs)] * len(self.slots), strategy="PACK", name=name)
        await self._patiently(self._room_given(self._room), self._waiting, FIRST_SAID_S)

    async def _room_given(self, room: PlacementGroup) -> None:
        while not await asyncio.to_thread(room.wait, 1):
            continue

    async def _patiently(self, wanted: Awaitable[Any], waiting: str, silent_s: float) -> Any:
        """Waits, and says so after `silent_s`; gives up with `RunFailed` after `MAX_WAIT_S`."""
        task, started = asyncio.ensure_future(wanted), time.monotonic()
        for slot in self.slots:
            slot.activity = waiting
        pause = min(silent_s, MAX_WAIT_S)
        try:
            while not (await asyncio.wait({task}, timeout=pause))[0]:
                pause = min(SAY_EVERY_S, MAX_WAIT_S)
                left = MAX_WAIT_S - (time.monotonic() - started)
                if left <= 0:
                    raise RunFailed(f"learner: no room in {MAX_WAIT_S:g} s: {waiting}; {_cluster(self._needs)}")
                log.warning("%s; %s; giving up in %.0f s", waiting, _cluster(self._needs), left)
            return task.result()
        finally:
            task.cancel()

    @property
    def _waiting(self) -> str:
        each = ", ".join(f"{name}: {amount:g}" for name, amount in self._needs.items())
        return f"waiting for {len(self.slots)} × {{{each}}}"

    async def _start(self, resume_from: str | None) -> None:
        threads = self.cfg.threads or max(1, cores() // len(self.slots))
        for rank, slot in enumerate(self.slots):
            slot.generation += 1
            slot.state, slot.activity = WorkerState.STARTING, "starting"
            suffix = f"#{slot.generation}" if slot.generation > 1 else ""
            options: dict[str, Any] = {
                "name": f"{self.ctx.run.name}/{slot.name}{suffix}",
                **ray_resources(self.cfg.resources),
                "max_restarts": 0,  # a restarted actor would lack its weights; the group starts as a whole
                "max_task_retries": 0,
                "runtime_env": {"env_vars": actor_env(threads)},
            }
            if self._room is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._room, rank)
            slot.handle = ray.remote(LearnerActor).options(**options).remote(self.ctx, slot.name)
        # Its node may have gone since: then Ray looks for another one.
        first_words = self._all("starting", [slot.actor.info.remote() for slot in self.slots])
        infos = await self._patiently(first_words, f"starting {len(self.slots)} process(es)", SAY_EVERY_S)
        for slot, info in zip(self.slots, infos, strict=True):
            slot.host, slot.activity = info["host"], "starting"
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
        """All ranks; their room stays theirs."""
        for slot in self.slots:
            slot.kill()

    def stop(self) -> None:
        self.kill()
        if self._room is not None:
            remove_placement_group(self._room)
            self._room = None
        for slot in self.slots:
            slot.activity = "stopped"

    # ------------------------------------------------------------------------------------------- calls

    # Each is made of every rank, and raises the ranks' `RushesError`, or `LearnerLost`.

    async def train_step(self, groups: list[TrainGroup], first: int, last: bool) -> TrainStepResult:
        """See `LearnerActor.train_step`."""
        return await self._call("train step", "train_step", groups, first, last)

    async def save(self, root: Path, controller: dict[str, Any], keep: int) -> str:
        """Writes checkpoint `root/step-<version>` with the controller's state; returns its path."""
        return await self._call("save", "save", str(root), controller, keep)

    async def export(self, out: Path) -> str:
        """Writes the trained policy for plain diffusers; returns the path."""
        return await self._call("export", "export", str(out))

    async def policy_version(self, tag: Literal["train", "ema"]) -> PolicyVersion:
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

    async def _all(self, what: str, calls: Sequence[ray.ObjectRef]) -> list[Any]:
        """All answers (`calls` in rank order). As soon as a rank fails, raises its `RushesError`, or `LearnerLost` with
        the failure that explains the others'. After `LearnerLost` no rank counts as alive."""
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if any(task.done() and task.exception() for task in tasks):
                await asyncio.wait(tasks, timeout=_WHO_DIED_S)
            failed = [(slot, task.exception()) for slot, task in zip(self.slots, tasks, strict=False) if task.done()]
            errors = [(slot, error) for slot, error in failed if error is not None]
        finally:
            for task in tasks:
                task.cancel()
        if not errors:
            return [task.result() for task in tasks]
        slot, error = min(errors, key=lambda pair: _how_far_from_the_cause(pair[1]))
        if is_deterministic(error):
            raise root(error) from None  # as it was raised, out of Ray's wrappers
        for each in self.slots:
            each.state = WorkerState.DEAD
        raise LearnerLost(f"{slot.place}: {what} failed: {describe(error)}") from error


def _how_far_from_the_cause(error: BaseException) -> int:
    """A rank's own verdict, a death, and whatever else follows from one: the others then only lose a connection."""
    return 0 if is_deterministic(error) else 1 if isinstance(error, rx.RayActorError) else 2


def _cluster(needs: Iterable[str]) -> str:
    """`the cluster has CPU 2 (0.5 free), GPU 0`."""
    total, free = ray.cluster_resources(), ray.available_resources()
    return "the cluster has " + ", ".join(f"{n} {total.get(n, 0):g} ({free.get(n, 0):g} free)" for n in needs)
