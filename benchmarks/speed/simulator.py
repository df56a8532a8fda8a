"""The controller without the arithmetic: workers sleep for drawn times, everything between them is the real code.

The controller, with its loop, batch builder, dispatcher, score batchers, pools and recorder, and `pipeline.rl.ledger`
run as in a real run, over real Ray calls and objects. Only the actors are others: a pool's slots are seats in a few
processes that hold many sleeping workers each. Efficiency is the time of an ideal schedule of the same drawn times
(`ideal`), in which nothing but rollout, scoring and learning takes time, divided by the measured time.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors import controller as controller_module
from actors import dispatcher as dispatcher_module
from actors import train_loop as loop_module
from actors import worker_slot as slot_module
from actors.controller import Controller
from actors.learner_group import LearnerGroup
from actors.learner_rank import TrainStepResult
from actors.ray_options import RunContext, from_bytes
from actors.train_loop import TrainLoop
from actors.worker_pool import WorkerPool
from actors.worker_slot import WorkerSlot
from pipeline.config.schema import Config
from pipeline.core.types import Media, RewardScores, RolloutMeta, Trajectory
from pipeline.rl.group_plan import accumulation_chunks

WARM_STEPS = 2  # left out of the measurement: the pipeline fills
LOCKSTEP = {"groups_per_worker": 1, "steps": 10}
PER_PROCESS = 32  # simulated workers in one process


@dataclass(frozen=True)
class Plan:
    """One simulated run. Seconds are means; each time is drawn from a gamma distribution around its mean."""

    workers: int
    rollout_s: float = 2.56  # of a group; 256 workers then finish one every 10 ms
    score_s: float = 0.2
    learn_share: float = 0.6  # of the time the workers need for the groups of a step
    spread: float = 0.15  # standard deviation / mean of a rollout, a scoring and a learner step
    steps: int = 6
    groups_per_worker: int = 2  # and step
    max_staleness: int = 1
    message_bytes: int = 131072  # of a trajectory and of a group's media: scaled down, still past Ray's inline limit
    weights_bytes: int = 1 << 20

    @property
    def groups_per_step(self) -> int:
        return self.workers * self.groups_per_worker

    @property
    def servers(self) -> int:
        """Reward servers, 40 % idle."""
        return max(1, round(self.workers * self.score_s / self.rollout_s / 0.6))

    def _draw(self, mean: float, *key: int) -> float:
        shape = 1.0 / self.spread**2
        return float(np.random.default_rng(key).gamma(shape, mean / shape))

    def rollout(self, group: int) -> float:
        return self._draw(self.rollout_s, 1, group)

    def score(self, group: int) -> float:
        return self._draw(self.score_s, 2, group)

    def learn(self, step: int) -> float:
        return self._draw(self.learn_share * self.rollout_s * self.groups_per_worker, 3, step)


def ideal(plan: Plan) -> list[float]:
    """End of each step [steps] in seconds if only the drawn times counted: free workers take groups in id order as soon
    as their policy version may be used, free servers score them, the learner takes a step in the portions of a run."""
    size = plan.groups_per_step
    taken = accumulation_chunks(_config(plan, Path()))
    workers, servers = [0.0] * plan.workers, [0.0] * plan.servers
    ends: list[float] = []
    rolled: list[list[tuple[float, int]]] = []

    def roll(step: int, open_at: float) -> None:
        rollouts = []
        for group in range(step * size, (step + 1) * size):
            start = max(heapq.heappop(workers), open_at)
            heapq.heappush(workers, start + plan.rollout(group))
            rollouts.append((start + plan.rollout(group), group))
        rolled.append(rollouts)

    for step in range(plan.steps):
        while len(rolled) < min(step + plan.max_staleness + 1, plan.steps):
            ahead = len(rolled)
            needed = ahead - plan.max_staleness  # the version that must be out: the end of step `needed` - 1
            roll(ahead, ends[needed - 1] if needed > 0 else 0.0)
        scored = np.zeros(size)
        for at, group in sorted(rolled[step]):
            done = max(heapq.heappop(servers), at) + plan.score(group)
            heapq.heappush(servers, done)
            scored[group % size] = done
        learned = ends[-1] if ends else 0.0
        for places in taken:
            learned = max(learned, scored[: places.stop].max()) + plan.learn(step) * len(places) / size
        ends.append(learned)
    return ends


# ---------------------------------------------------------------------------------------------- sleeping actors


class Sleepers:
    """Many rollout workers, reward servers, or the learner, in one process (an asyncio actor)."""

    def __init__(self, plan: Plan) -> None:
        for thread in os.listdir("/proc/self/task"):  # they stand for other machines: the controller comes first
            os.setpriority(os.PRIO_PROCESS, int(thread), 10)
        self.plan = plan
        self.step = 0

    def info(self, seat: str) -> dict[str, Any]:
        place = ray.get_runtime_context().get_node_id()
        return {"name": seat, "pid": os.getpid(), "host": "simulated", "node": place, "rss": 0, "peak_rss": 0}

    def start(self, seat: str, *_: Any) -> dict[str, Any]:
        return {**self.info(seat), "device": "cpu", "version": 0, "probe": {}, "grid": None}

    async def generate(self, seat: str, order: bytes, missing: np.ndarray | None) -> tuple[Any, Any, Any]:
        (work,), (number, *_) = from_bytes(order)
        seconds = self.plan.rollout(work.group)
        await asyncio.sleep(seconds)
        size = self.plan.message_bytes
        meta = RolloutMeta(
            group=work.group,
            attempt=work.attempt,
            version=number,
            worker=seat,
            seconds={"encode": 0.0, "denoise": seconds, "decode": 0.0, "total": seconds},
            trajectory_bytes=size,
            media_bytes=size,
        )
        latents = np.zeros(size, np.uint8)
        trajectory = Trajectory(group=work.group, version=number, sampling=work.sampling, parts=(), spec={"x": latents})
        return [meta], Media(frames=np.zeros((2, 1, size // 6, 1, 3), np.uint8), fps=8.0), trajectory

    async def score(self, seat: str, order: bytes, *media: Media) -> list[RewardScores]:
        scores = []
        for work in from_bytes(order):
            seconds = self.plan.score(work.group)
            await asyncio.sleep(seconds)
            scores.append(RewardScores(values=np.array([work.group % 7, 1.0], np.float32), seconds=seconds))
        return scores

    async def train_step(self, seat: str, groups: list[Any], first: int, last: bool) -> TrainStepResult:
        began = time.monotonic()
        await asyncio.gather(*(group.trajectory for group in groups))
        share = len(groups) / self.plan.groups_per_step
        await asyncio.sleep(max(0.0, self.plan.learn(self.step) * share - (time.monotonic() - began)))
        self.step += last
        return TrainStepResult(self.step, metrics={"onpolicy/max_abs_log_ratio": 0.0})

    def weights(self, seat: str, tag: str) -> tuple[dict[str, Any], np.ndarray]:
        return {"number": self.step, "checksum": str(self.step)}, np.zeros(self.plan.weights_bytes, np.uint8)

    def save(self, seat: str, root: str, *_: Any) -> str:
        return root

    def export(self, seat: str, out: str, source: str | None = None) -> str:
        return out


class _Call:
    def __init__(self, method: Any, seat: str) -> None:
        self._method, self._seat = method, seat

    def options(self, **options: Any) -> _Call:
        return _Call(self._method.options(**options), self._seat)

    def remote(self, *args: Any) -> Any:
        return self._method.remote(self._seat, *args)


class Seat:
    """Looks like one actor's handle; is one of many in a process."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor, self._name = actor, name

    def __getattr__(self, method: str) -> _Call:
        return _Call(getattr(self._actor, method), self._name)


class SeatPool(WorkerPool):
    """A pool whose slots share processes."""

    plan: Plan  # set before the loop is made

    async def _start_actor(self, slot: WorkerSlot) -> None:
        if not hasattr(self, "processes"):
            self.processes: dict[int, Any] = {}
        number = int(slot.name.rpartition("-")[2]) if "-" in slot.name else 0
        place = number // PER_PROCESS
        if place not in self.processes:
            self.processes[place] = ray.remote(Sleepers).options(num_cpus=0, max_concurrency=1000).remote(self.plan)
        slot.handle = Seat(self.processes[place], slot.name)  # type: ignore[assignment]
        slot.info = await slot.actor.start.remote()
        slot.host = "simulated"
        self._one_ready.set()
        self.offer(slot)


class SeatLearner(LearnerGroup):
    """A learner of one rank that sleeps."""

    plan: Plan

    async def start(self, resume_from: str | None) -> None:
        actor = ray.remote(Sleepers).options(num_cpus=0, max_concurrency=1000).remote(self.plan)
        slot = self.slots[0]
        slot.handle, slot.host = Seat(actor, slot.name), "simulated"  # type: ignore[assignment]
        slot.info = await slot.actor.start.remote()
        slot.set_idle()


class MarkedLoop(TrainLoop):
    """Notes the time and this process's CPU time at the end of each step."""

    marks: list[tuple[float, float]] = []

    async def _train_step(self) -> None:
        await super()._train_step()
        self.marks.append((time.monotonic(), time.process_time()))


class SimulatedController(Controller):
    def __init__(self, ctx: RunContext, plan: Plan) -> None:
        super().__init__(ctx, None)
        SeatPool.plan = SeatLearner.plan = plan
        dispatcher_module.WorkerPool = SeatPool  # type: ignore[misc]
        slot_module.end_process = lambda handle: None  # type: ignore[assignment]
        loop_module.LearnerGroup = SeatLearner  # type: ignore[misc]
        controller_module.TrainLoop = MarkedLoop  # type: ignore[misc]

    async def run(self) -> dict[str, Any]:
        MarkedLoop.marks = [(time.monotonic(), time.process_time())]
        await super().run()
        return {"marks": MarkedLoop.marks}


def _config(plan: Plan, folder: Path) -> Config:
    """`folder`: of the run; prompts are in it."""
    prompts = folder / "prompts.txt"
    return Config.model_validate(
        {
            "run": {"dir": str(folder), "steps": plan.steps},
            "generator": {"pretrained": "simulated"},
            "prompts": {"train": str(prompts)},
            "rewards": {"r": {"scorer": "simulated", "workers": plan.servers}},
            "step": {"takes": 2, "groups": plan.groups_per_step, "max_staleness": plan.max_staleness},
            "rollout": {"workers": plan.workers},
            "checkpoint": {"every": 0},
            "tracking": {"backends": []},
            "ray": {"address": "local", "init": {"num_cpus": 8, "object_store_memory": 2**30}},
        }
    )


def simulate(plan: Plan) -> dict[str, float]:
    """Runs one simulation on the Ray that is connected.

    Returns `efficiency` (ideal time / measured time, both after the warm-up), `controller_ms_per_group` (CPU time of
    the controller's process, Ray's threads included), `groups_per_s` and `step_s`.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg = _config(plan, Path(folder))
        Path(cfg.prompts.train).write_text("".join(f"simulated prompt {i}\n" for i in range(64)))
        run = Path(folder) / "run"
        run.mkdir()
        ctx = RunContext(cfg=cfg, run_path=str(run), cwd=os.getcwd())
        controller: Any = ray.remote(SimulatedController).options(num_cpus=0).remote(ctx, plan)
        try:
            marks = ray.get(controller.run.remote(), timeout=600)["marks"]
        finally:
            ray.kill(controller)
    ends = ideal(plan)
    steps = plan.steps - WARM_STEPS
    wall = marks[-1][0] - marks[WARM_STEPS][0]
    groups = steps * plan.groups_per_step
    return {
        "efficiency": (ends[-1] - ends[WARM_STEPS - 1]) / wall,
        "controller_ms_per_group": 1e3 * (marks[-1][1] - marks[WARM_STEPS][1]) / groups,
        "groups_per_s": groups / wall,
        "step_s": wall / steps,
    }


def simulate_all(sizes: Sequence[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Simulations at several numbers of workers, on a local Ray; `efficiency_<largest>` is the headline. And of
    the largest number in lockstep: one group per worker and step, so that all begin and end at nearly the same time."""
    from jobs.cluster.ray_session import RaySession

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, RaySession(_config(Plan(workers=1), Path(folder))):
        small = [workers for workers in sizes if workers <= 16]  # these keep a core idle even together
        say(f"simulating {', '.join(map(str, small))} workers side by side")
        with ThreadPoolExecutor() as pool:
            results |= zip(map(str, small), pool.map(simulate, [Plan(workers=n) for n in small]), strict=True)
        for workers in sorted(set(sizes) - set(small)):
            say(f"simulating {workers} workers")
            results[str(workers)] = simulate(Plan(workers=workers))
        results |= {f"efficiency_{workers}": results[str(workers)]["efficiency"] for workers in sizes}
        say(f"simulating {max(sizes)} workers in lockstep")
        results["lockstep"] = {"workers": max(sizes), **simulate(replace(Plan(workers=max(sizes)), **LOCKSTEP))}
    plan = asdict(Plan(workers=max(sizes)))
    return results | {"plan": plan, "workers_per_process": PER_PROCESS}
