"""A dispatcher whose rollout workers and reward servers are made up: a test says what their calls do."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import tiny

from actors import worker_slot
from actors.dispatcher import Dispatcher
from actors.group_run import GroupRun
from actors.ray_options import RunContext, from_bytes
from actors.worker_pool import WorkerPool
from actors.worker_slot import WorkerSlot, WorkerState
from pipeline.config.resources import WorkerRange
from pipeline.core.types import GroupWork, PolicyVersion, PromptItem, RewardScores, RolloutMeta
from pipeline.rl.group_plan import train_work

PROMPT = PromptItem(index=0, text="a red circle")


VERSION = PolicyVersion(number=0, tag="train", checksum="c", weights="weights")


class Reference:
    """To a made-up actor's answer: as with Ray's, it may be awaited again, and a cancelled await leaves the call be."""

    def __init__(self, answer: Awaitable) -> None:
        self._call = asyncio.ensure_future(answer)
        self._call.add_done_callback(lambda call: call.cancelled() or call.exception())

    def __await__(self):
        return asyncio.shield(self._call).__await__()


class Method:
    def __init__(self, call: Callable) -> None:
        self.remote = call

    def options(self, **_options) -> Method:
        return self


class Actor:
    """A made-up rollout worker or reward server. What it does is the `World`'s."""

    def __init__(self, world: World, pool: WorkerPool, slot: WorkerSlot) -> None:
        self.world, self.pool, self.slot = world, pool, slot
        self.info = Method(lambda: Reference(self._info()))
        self.start = Method(lambda *args: Reference(self._start()))
        self.generate = Method(self._generate)
        self.score = Method(lambda order, *media: Reference(self._score(from_bytes(order), media)))

    async def _info(self) -> dict:
        return {"host": "here", "node": "n", "pid": 0, "grid": None}

    async def _start(self) -> dict:
        self.world.on_start(self.pool)
        return await self._info()

    def _generate(self, order: bytes, weights: str | None) -> list:
        works, key = from_bytes(order)
        objects = [f"{what} {work.group}" for work in works for what in ("media", "trajectory")]
        return [Reference(self._drawn(works, key, weights)), *objects]

    async def _drawn(self, works: list[GroupWork], key, weights: str | None) -> list[RolloutMeta]:
        self.world.rollouts.append((self.slot.name, works))
        self.world.weights.append(weights)
        await self.world.rollout_takes()
        self.world.on_rollout(self.slot.name, works)
        return [
            RolloutMeta(
                group=work.group,
                attempt=work.attempt,
                version=key[0],
                worker=self.slot.name,
                seconds={"total": 0.0},
                trajectory_bytes=0,
                media_bytes=0,
            )
            for work in works
        ]

    async def _score(self, requests, media) -> list:
        groups = [request.group for request in requests]
        assert list(media) == [f"media {group}" for group in groups]
        self.world.scorings.append((self.slot.name, groups))
        await self.world.scoring_takes()
        return self.world.on_score(self.slot.name, groups)


async def no_time() -> None:
    await asyncio.sleep(0)


def scores_of(groups: list[int]) -> list:
    return [RewardScores(values=np.full(4, group, np.float32)) for group in groups]


class World:
    """A dispatcher whose actors do what a test says."""

    def __init__(self, folder: Path, monkeypatch, rollout_workers=2, servers=1, rewards=("a",), **sections) -> None:
        cfg = tiny.config(
            folder,
            **{
                "run": {"steps": 9},
                "rollout": {"workers": rollout_workers},
                "step": {"takes": 4, "groups": 3},
                "faults": {"max_attempts": 2, "call_timeout_s": 30},
                **sections,
            },
        )
        reward = next(iter(cfg.rewards.values())).model_copy(
            update={"workers": WorkerRange(servers, servers), "batch_items": 12}
        )
        self.cfg = cfg.model_copy(update={"rewards": dict.fromkeys(rewards, reward)})
        self.rollouts: list[tuple[str, list[GroupWork]]] = []
        self.scorings: list[tuple[str, list[int]]] = []
        self.weights: list[str | None] = []
        self.rollout_takes: Callable[[], Awaitable[None]] = no_time
        self.scoring_takes: Callable[[], Awaitable[None]] = no_time
        self.on_start: Callable[[WorkerPool], None] = lambda pool: None
        self.on_rollout: Callable[[str, list[GroupWork]], None] = lambda worker, works: None
        self.on_score: Callable[[str, list[int]], list] = lambda server, groups: scores_of(groups)
        self.dispatcher = Dispatcher(RunContext(cfg=self.cfg, run_path=str(folder), cwd=os.getcwd()), [PROMPT])

        def new_actor(pool: WorkerPool, slot: WorkerSlot) -> None:
            slot.generation += 1
            slot.state, slot.replace_reason = WorkerState.STARTING, ""
            slot.handle = Actor(self, pool, slot)

        monkeypatch.setattr(WorkerPool, "_new_actor", new_actor)
        monkeypatch.setattr(worker_slot, "end_process", lambda handle: None)

    def group(self, number: int) -> GroupRun:
        return GroupRun(train_work(self.cfg, number, 0, PROMPT))

    async def run_group(self, run: GroupRun, lost: str = "") -> None:
        await self.dispatcher.run_group(run, lambda works: VERSION, lost)

    async def together(self, runs: list[GroupRun]) -> list:
        """They share a rollout call. Outcomes: None, or an exception."""
        await self.dispatcher.rollout_together(runs, lambda works: VERSION)
        return await asyncio.gather(*(self.run_group(run) for run in runs), return_exceptions=True)

    async def all_alive(self) -> None:
        pools = self.dispatcher.pools
        while not all(slot.alive for pool in pools for slot in pool.slots):
            await asyncio.sleep(0.001)

    def run(self, body: Callable[[], Awaitable]):
        async def beside_it():
            running = asyncio.ensure_future(self.dispatcher.run())
            try:
                await self.dispatcher.ready()
                await self.all_alive()
                return await asyncio.wait_for(body(), 20)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

        return asyncio.run(beside_it())

    @property
    def drawn(self) -> list[list[int]]:
        """Groups of each rollout call."""
        return [[work.group for work in works] for _, works in self.rollouts]


def fail_times(count: int, error: Exception) -> Callable:
    """Raises `error` so many times."""
    left = [count]

    def fail(*_args) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise error

    return fail
