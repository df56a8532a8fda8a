"""Records what a step leaves behind: metrics, tracker files, Prometheus gauges, and the takes that are kept.

One thread writes the files, in order, while the next step runs.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from actors.group_run import GroupRun
from actors.prometheus import RunMetrics, tried
from actors.ray_errors import describe, is_lost
from actors.ray_options import RunContext
from actors.worker_pool import WorkerPool
from pipeline.core.errors import RushesError, one_line
from pipeline.core.types import Media, TakeCaption
from pipeline.rl.ledger import Ledger
from pipeline.runs.tracking import drop_metrics_since, make_tracker

CLOSE_S = 60.0  # more than the trackers take
_KEPT = 1000  # steps whose metrics stay in memory, about 10 kB each; all are in metrics.jsonl
log = logging.getLogger("rushes.recorder")


class Recent:
    """Metrics of the last steps of this process. `count`: steps whose metrics have been added."""

    def __init__(self, kept: int = _KEPT) -> None:
        self.count, self._kept = 0, kept
        self._records: list[dict[str, float]] = []

    def add(self, record: dict[str, float]) -> None:
        self.count += 1
        self._records = [*self._records, record][-self._kept :]

    def after(self, seen: int) -> list[dict[str, float]]:
        """Those after the first `seen`, or the last n of them (-n), as far as they are kept."""
        dropped = self.count - len(self._records)
        return self._records[seen if seen < 0 else max(0, seen - dropped) :]


class Recorder:
    """Records go to the run's folder, to the trackers and to Ray's metrics."""

    def __init__(self, ctx: RunContext, pools: Sequence[WorkerPool]) -> None:
        self.ctx, self.cfg, self._pools = ctx, ctx.cfg, pools
        self.recent = Recent()
        self._tracker = make_tracker(self.cfg, ctx.run.path)
        self._gauges = RunMetrics(ctx.run.name)
        self._writer = ThreadPoolExecutor(1, "writer")
        self._cpu_s = time.process_time()
        self._writes: set[asyncio.Future] = set()
        self._lost: list[str] = []
        self._closed = False
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def watch(self) -> None:
        """Waits for the first write that fails, and raises its exception. The writes themselves are no tasks of the
        run's task group: they are finished even when the run fails."""
        await self._failure

    # ------------------------------------------------------------------------------------------- metrics

    def step(self, step: int, metrics: dict[str, float], runs: list[GroupRun], ledger: Ledger) -> None:
        """Records optimisation step `step` (counted after it) and frees the media of its groups."""
        metrics = {
            **metrics,
            **self._mean_parts(runs),
            "groups/filtered": float(ledger.ended["filtered"]),
            "groups/failed": float(ledger.ended["failed"]),
            "retries": float(ledger.retries),
        }
        self.recent.add({"step": step, **metrics})
        tried(lambda: self._gauges.set({**metrics, "step": step}))
        self._write(self._tracker.log, step, metrics)
        if self.cfg.tracking.save_takes_every and step % self.cfg.tracking.save_takes_every == 0:
            kept = [(run, run.media) for run in runs if run.media is not None]
            self._watch(asyncio.ensure_future(self._keep_takes(kept, step)))
        for run in runs:
            run.media = None

    def evaluation(self, record: dict[str, Any], media: Media | None, captions: Sequence[TakeCaption]) -> None:
        values = {"heldout/mean": record["mean"]}
        if record["se"] is not None:
            values["heldout/se"] = record["se"]
        values |= {f"heldout/{name}": entry["mean"] for name, entry in record["rewards"].items()}
        values |= {f"guard/{name}": entry["mean"] for name, entry in record["guards"].items()}
        if "verdict" in record:
            kind = record["verdict"]["kind"]
            values |= {"verdict/suspect": float(kind == "suspect"), "verdict/improved": float(kind == "improved")}
            named = {"mean": record["changes"]["reward"], **record["changes"]["rewards"]}
            for name, change in named.items():
                values[f"change/{name}"] = change["mean"]
                values |= {f"change/{name}/ci95": change["ci95"]} if change["ci95"] is not None else {}
        tried(lambda: self._gauges.set(values))
        self._write(self._tracker.log, record["step"], values)
        if media is not None:
            self._write(self._tracker.log_media, record["step"], "heldout", media, captions)

    def times(self, runs: list[GroupRun], step_s: float, learned_s: float, sync_s: float) -> dict[str, float]:
        """Seconds of the step, busy seconds of each role (per worker; CPU seconds of this process), and the queues."""
        cpu_s, self._cpu_s = time.process_time() - self._cpu_s, time.process_time()
        workers = {pool.name: max(1, len(pool.alive)) for pool in self._pools}
        rollout = sum(run.meta.seconds["total"] for run in runs) / workers["rollout"]
        score = {
            name: sum(run.scores[name].seconds for run in runs if name in run.scores) / workers[f"reward.{name}"]
            for name in self.cfg.server_rewards("train")
        }
        times = {
            "time/step": step_s,
            "time/rollout": rollout,
            "time/score": sum(score.values()),
            "time/learn": learned_s,
            "time/sync": sync_s,
            "time/controller": cpu_s,
            "takes_per_s": self.cfg.step.takes * len(runs) / step_s,
        }
        times |= {f"workers/{name}": float(count) for name, count in workers.items()}
        times |= {f"time/score/{name}": seconds for name, seconds in score.items()}
        for pool in self._pools:
            times |= {f"queue/{pool.name}/{key}": value for key, value in pool.backlog.drain_stats().items()}
        return times

    def _mean_parts(self, runs: list[GroupRun]) -> dict[str, float]:
        """Means of the scorers' auxiliary outputs, without the NaN of prompts to which a part does not apply."""
        means: dict[str, float] = {}
        for name in self.cfg.server_rewards("train"):
            scores = [run.scores[name] for run in runs if name in run.scores]
            for part in dict.fromkeys(part for each in scores for part in each.parts):
                values = [float(v) for each in scores for v in each.parts.get(part, ()) if v == v]
                if values:
                    means[f"reward/{name}/{part}"] = sum(values) / len(values)
        return means

    # ------------------------------------------------------------------------------------------- files

    async def flush(self) -> None:
        """Returns once everything recorded so far is written. Raises the first error of a write."""
        await asyncio.gather(*self._writes)

    async def rewind(self, step: int) -> None:
        """The run begins again with `step`: later records are dropped, once everything so far is written."""
        await self.flush()
        await asyncio.to_thread(drop_metrics_since, self.ctx.run.path, step)
        self._write(self._tracker.rewind, step)

    async def close(self) -> list[str]:
        """Waits for the writes, at most `CLOSE_S` seconds: a disk that does not answer does not hold the end. Returns
        what optional records lack, one line each."""
        if not self._closed:
            self._closed = True
            closing = asyncio.get_running_loop().run_in_executor(self._writer, self._tracker.close)
            _, unwritten = await asyncio.wait({*self._writes, closing}, timeout=CLOSE_S)
            if unwritten:
                log.error("%d writes to %s did not end in %.0f s", len(unwritten), self.ctx.run.path, CLOSE_S)
                self._lost.append(f"{len(unwritten)} writes to the run's folder did not end")
            elif (error := closing.exception()) is not None:
                log.warning("the trackers could not be closed: %s", describe(error))
            self._writer.shutdown(wait=False)
        return [*self._lost, *self._tracker.missing()]

    async def _keep_takes(self, kept: list[tuple[GroupRun, ray.ObjectRef]], step: int) -> None:
        from pipeline.core.takes_table import save_takes

        folder = self.ctx.run.train_takes(step)
        weights = self.cfg.reward_weights

        def write(run: GroupRun, frames: Media) -> None:
            work, version = run.work, run.meta.version
            save_takes(folder, frames, work.prompts, work.seeds, version, run.scores, step=step, weights=weights)

        loop = asyncio.get_running_loop()
        # Takes are appended, and a run that was killed after this step may have left some.
        await loop.run_in_executor(self._writer, lambda: shutil.rmtree(folder, ignore_errors=True))
        for run, reference in kept:
            try:
                frames = await reference
            except Exception as error:
                if not is_lost(error):
                    raise
                log.warning("training takes are gone, not kept: %s", describe(error), extra={"group": run.group})
            else:
                try:
                    await loop.run_in_executor(self._writer, write, run, frames)
                except (OSError, RushesError) as error:  # nothing of the run depends on them
                    if not self._lost:
                        log.warning("the takes of step %d could not be kept: %s; the run continues", step, error)
                    self._lost.append(f"takes of step {step}: {one_line(error)}")
                    return

    def _write(self, function: Callable[..., None], *args: Any) -> None:
        self._watch(asyncio.get_running_loop().run_in_executor(self._writer, function, *args))

    def _watch(self, task: asyncio.Future) -> None:
        self._writes.add(task)

        def ended(done: asyncio.Future) -> None:
            self._writes.discard(done)
            error = None if done.cancelled() else done.exception()
            if error is not None and not self._failure.done():
                self._failure.set_exception(error)

        task.add_done_callback(ended)
