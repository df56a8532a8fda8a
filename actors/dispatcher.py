"""The life of a group, from a free rollout worker to its scores.

    BatchBuilder ─┐  room   ┌──────────── run_group ────────────┐
                  ├───────► │ lease a worker ──► draw the takes │
    Evaluator ────┘         │      │ held until there is room   │
                            │      ▼                            │      ┌──────────────────────────┐
                            │ one request per reward ───────────┼────► │ ScoreBatcher of a reward │
                            │      ▼                            │ ◄─── │ lease a server ──► score │
                            │ GroupRun with scores, GroupFailed │      └──────────────────────────┘
                            └───────────────────────────────────┘

`run_group` decides the group's fate: again on the same seeds, or `GroupFailed` after `faults.max_attempts`. The lease
(`actors.worker_pool`) decides the worker's. A reward whose service is away is waited for, which is no attempt. Frames
and latents stay in the object store; references are passed on.

run_group   consumes    a GroupRun, from training or evaluation
            waits for   a free worker (lowest priority number first), room at every reward, its scores
            unblocked   by workers and servers that come free
pools       a task per slot starts and replaces its actor: `actors.worker_pool`
batchers    one loop per reward forms the calls of its servers: `actors.score_batcher`
supervisor  once a second: sizes, health, draining nodes: `actors.pool_supervisor`
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from actors.group_run import GroupFailed, GroupRun, GroupState, PolicySource
from actors.pool_supervisor import PoolSupervisor
from actors.ray_errors import is_away, is_bad_input, is_lost, is_preempted
from actors.ray_options import RunContext, to_bytes
from actors.request_queue import RequestQueue
from actors.reward_server import RewardServer
from actors.rollout_worker import RolloutWorker
from actors.score_batcher import PendingScore, ScoreBatcher
from actors.worker_pool import CallFailed, WorkerPool
from actors.worker_slot import WorkerSlot
from pipeline.core.types import GroupWork, PolicyVersion, PromptItem, RewardScores, RolloutMeta
from pipeline.rewards.patience import Patience
from pipeline.rl.noise_grid import NoiseGrid
from pipeline.rl.signals.base import labels_of

log = logging.getLogger("rushes.dispatcher")


class Dispatcher:
    """Pools, queues and the coroutine of a group (`actors.group_run.GroupRunner`)."""

    def __init__(self, ctx: RunContext, probe_prompts: list[PromptItem], resumed: bool = False) -> None:
        """`resumed`: the rewards have worked before, so that a service which is away now is waited for."""
        cfg, self._max_attempts = ctx.cfg, ctx.cfg.faults.max_attempts
        capacity = cfg.rollout.queue_capacity
        self.rollouts = WorkerPool(
            ctx,
            RolloutWorker,
            "rollout",
            cfg.rollout.workers,
            resources=cfg.rollout.resources,
            threads=cfg.rollout.threads,
            start_args=(probe_prompts,),
            capacity=capacity,
        )
        self._batchers: dict[str, ScoreBatcher] = {}
        self._patience: dict[str, Patience] = {}
        self.pools = [self.rollouts]
        self._rewards_for = {"train": cfg.server_rewards("train"), "eval": cfg.server_rewards("eval")}
        for name in cfg.served_rewards:
            reward = cfg.rewards[name]
            requests: RequestQueue[PendingScore] = RequestQueue(f"reward.{name}", capacity)
            pool = WorkerPool(
                ctx,
                RewardServer,
                f"reward.{name}",
                reward.workers,
                resources=reward.resources,
                threads=reward.threads,
                start_args=(name, probe_prompts),
                capacity=capacity,
                runtime_env=reward.runtime_env,
                backlog=requests,
                patient=resumed,
            )
            self._patience[name] = Patience(f"reward {name}", cfg.faults.call_timeout_s, "faults.call_timeout_s")
            self._batchers[name] = ScoreBatcher(reward, pool, requests)
            self.pools.append(pool)
        self.supervisor = PoolSupervisor(self.pools)
        self._load_s = 0.0
        self.grid: NoiseGrid | None = None  # the same for all workers: checkpoint and config fix it

    # ------------------------------------------------------------------------------------------- background

    async def run(self) -> None:
        """Starts all workers, and ends them when it is cancelled. Raises what ends the run."""
        async with asyncio.TaskGroup() as tasks:
            for pool in self.pools:
                pool.start(tasks)
            for batcher in self._batchers.values():
                tasks.create_task(batcher.run())
            tasks.create_task(self.supervisor.run())

    async def ready(self) -> None:
        """Returns once there is a worker of each kind, and the grid is known."""
        await self.rollouts.one_ready()
        self.grid = next(slot.info["grid"] for slot in self.rollouts.slots if "grid" in slot.info)
        for pool in self.pools[1:]:
            await pool.one_ready()

    def step_finished(self, seconds: float) -> None:
        """An optimisation step took this long: autoscaling looks at two of them at least."""
        for pool in self.pools:
            pool.history.step(seconds)

    def drain_load_s(self) -> float:
        """The longest that a worker took to load and check new weights, since the last call."""
        seconds, self._load_s = self._load_s, 0.0
        return seconds

    # ------------------------------------------------------------------------------------------- a group's life

    async def room(self) -> None:
        """Waits while `rollout.queue_capacity` calls wait for a rollout worker."""
        await self.rollouts.requests.room()

    async def run_group(self, run: GroupRun, policy: PolicySource, lost: str = "") -> None:
        """rollout -> every reward; returns when `run` is SCORED.

        `lost`: takes drawn earlier are gone, for this reason. Raises `GroupFailed` after `faults.max_attempts` failed
        rollouts, or as many failed scorings of the same takes.
        """
        if lost:
            self._rollout_failed(run, "scoring", lost)
        while run.state is not GroupState.SCORED:
            # 1. Takes, unless the group was drawn with others. The seeds are the same in every attempt.
            if run.state is GroupState.WAITING:
                try:
                    await self._rollout([run], policy)
                except CallFailed as failure:
                    run.avoid = failure.worker_name
                    if not is_preempted(failure.cause):
                        self._rollout_failed(run, "rollout", str(failure), final=is_bad_input(failure.cause))
                    continue
            # 2. Every reward scores them. Lost media are drawn again.
            try:
                run.scores = await self._score(run)
            except CallFailed as failure:
                self._rollout_failed(run, "scoring", str(failure))
                continue
            # 3. Done.
            run.state = GroupState.SCORED

    async def rollout_together(self, runs: Sequence[GroupRun], policy: PolicySource) -> None:
        """Draws groups of one step in one pipeline call. If that fails, none of them is charged: `run_group` draws each
        in a call of its own."""
        try:
            await self._rollout(runs, policy)
        except CallFailed as failure:
            if not is_preempted(failure.cause):
                log.warning("drawing %d groups in one call failed: %s; they are drawn one by one", len(runs), failure)
            for run in runs:
                run.avoid = failure.worker_name

    # ------------------------------------------------------------------------------------------- rollout

    async def _rollout(self, runs: Sequence[GroupRun], policy: PolicySource) -> None:
        """One call of one worker, which is held until every reward has room for the media: back-pressure."""
        async with self.rollouts.lease(runs[0].priority, runs[0].avoid) as worker:
            try:
                await self._draw(worker, runs, policy([run.work for run in runs]))
                worker.activity = "handing over"
                for run in runs:
                    for name in self._rewards_of(run.work):
                        run.requests[name] = await self._batchers[name].put(run)
            except (CallFailed, asyncio.CancelledError):
                for run in runs:
                    self._withdraw_requests(run)
                    run.start_over()
                raise

    async def _draw(self, worker: WorkerSlot, runs: Sequence[GroupRun], version: PolicyVersion) -> None:
        """Draws the groups with `version`. This process owns the references of their takes, which so outlive the
        worker."""
        for run in runs:
            run.begin_rollout()
        worker.activity = f"{runs[0].work.purpose} group {', '.join(str(run.group) for run in runs)}"
        # Given as they are, Ray brings the weights to the worker's node while it is still busy with something else.
        weights = None if worker.policy_version == version.key else version.weights
        if weights is not None:
            worker.policy_version = None  # not known until the call has succeeded
        request = to_bytes(([run.work for run in runs], version.key))
        answer, *objects = worker.actor.generate.options(num_returns=1 + 2 * len(runs)).remote(request, weights)
        metas: list[RolloutMeta] = await self.rollouts.result(worker, answer, "generated")
        worker.policy_version = version.key
        self._load_s = max(self._load_s, metas[0].seconds.get("load", 0.0))
        for run, meta, media, trajectory in zip(runs, metas, objects[::2], objects[1::2], strict=True):
            run.drawn(meta, media, trajectory)

    def _rollout_failed(self, run: GroupRun, during: str, reason: str, final: bool = False) -> None:
        """The group needs new takes. Raises `GroupFailed` when it has no attempt left, or another would fail too."""
        run.failed_rollouts += 1
        self._retry_or_fail(run, run.failed_rollouts, during, reason, final)
        run.start_over()

    def _retry_or_fail(self, run: GroupRun, failures: int, during: str, reason: str, final: bool = False) -> None:
        again = failures < self._max_attempts and not final
        outcome = "it is tried again" if again else "the group has failed"
        log.warning("%s failed: %s; %s", during, reason, outcome, extra={"group": run.group})
        if not again:
            raise GroupFailed(reason, failures)
        run.retries += 1

    # ------------------------------------------------------------------------------------------- scoring

    async def _score(self, run: GroupRun) -> dict[str, RewardScores]:
        """The scores of the rewards that servers score this group with, in config order; a training group may have
        none, and given takes their labels instead. Raises `CallFailed` when the media are lost, or `GroupFailed`."""
        try:
            labels = labels_of(run.work)
            if labels is not None:
                return dict(labels)
            return {name: await self._score_one(run, name) for name in self._rewards_of(run.work)}  # queued already
        finally:
            self._withdraw_requests(run)

    def _rewards_of(self, work: GroupWork) -> tuple[str, ...]:
        """Names of the rewards that servers score a group with."""
        return self._rewards_for[work.purpose] if not work.labels else ()

    async def _score_one(self, run: GroupRun, reward: str) -> RewardScores:
        patience = self._patience[reward]
        while True:
            try:
                scores = await run.requests[reward].scores
            except CallFailed as failure:
                if is_lost(failure.cause):
                    raise
                avoid = None
                if is_away(failure.cause):
                    pause_s = patience.pause_s(failure.cause)
                    if pause_s is None:
                        reason = f"{failure}; away for {patience.away_s:.0f} s ({patience.bound})"
                        raise GroupFailed(reason, run.failed_scorings + 1) from failure
                    await asyncio.sleep(pause_s)
                else:
                    run.failed_scorings += 1
                    self._retry_or_fail(run, run.failed_scorings, "scoring", str(failure))
                    avoid = failure.worker_name
                run.requests[reward] = self._batchers[reward].retry(run, avoid)
            else:
                patience.answered()
                return scores

    def _withdraw_requests(self, run: GroupRun) -> None:
        for name, request in run.requests.items():
            self._batchers[name].withdraw(request)
        run.requests = {}
