"""Evaluation on held-out prompts: fixed seeds, ODE sampler, centre frame picks, EMA weights where kept."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from actors.dispatcher import Dispatcher, Job
from actors.ray_errors import describe, is_lost
from actors.ray_options import RunContext
from pipeline.core.errors import RunFailed
from pipeline.core.files import atomic_write
from pipeline.core.statistics import with_error
from pipeline.core.types import Media, PolicyVersion, PromptItem
from pipeline.rl.evaluation import summarise_scores
from pipeline.rl.group_plan import SHOWN_PROMPTS, eval_works

log = logging.getLogger("rushes.evaluation")


class _Sink:
    """The books of one evaluation. Every group must succeed: a mean over what is left would not be comparable."""

    def __init__(self, version: PolicyVersion, groups: int, max_attempts: int, shown: set[int]) -> None:
        """`shown`: indices of the prompts whose media are kept."""
        self.retired = False
        self._version, self._max, self._shown = version, max_attempts, shown
        self._rollouts = dict.fromkeys(range(groups), 0)
        self._scorings = dict.fromkeys(range(groups), 0)
        self.groups = groups
        self.jobs: dict[int, Job] = {}
        self.done = asyncio.Event()

    def version(self) -> PolicyVersion:
        return self._version

    def started(self, job: Job, worker: str, version: PolicyVersion) -> int:
        self._rollouts[job.group] += 1
        return self._rollouts[job.group]

    def rolled(self, job: Job) -> None:
        self._scorings[job.group] = 0

    def scoring(self, job: Job) -> None:
        self._scorings[job.group] += 1

    def rollout_failed(self, job: Job, reason: str) -> bool:
        return self._retry(self._rollouts[job.group], reason)

    def lost(self, job: Job, reason: str) -> bool:
        return self._retry(self._rollouts[job.group], reason)

    def scoring_failed(self, job: Job, reason: str) -> bool:
        return self._retry(self._scorings[job.group], reason)

    def handed_back(self, job: Job) -> None:
        self._rollouts[job.group] -= 1

    def _retry(self, attempts: int, reason: str) -> bool:
        if attempts >= self._max:
            raise RunFailed(
                f"the evaluation at step {self._version.number} failed after {attempts} attempts in {reason}"
            )
        return True

    async def scored(self, job: Job) -> None:
        self.jobs[job.group] = job
        job.trajectory = None
        if not any(prompt.index in self._shown for prompt in job.work.prompts):
            job.media = None
        if len(self.jobs) == self.groups:
            self.done.set()

    def close(self) -> None:
        """What a straggler still brings is dropped, and so are the jobs: they hold these books, which hold the version,
        a whole copy of the weights in the object store, and Python would look for such a circle only now and then."""
        self.retired = True
        self.jobs.clear()


class Evaluator:
    """Runs evaluations and keeps their records, which are also evals.jsonl."""

    def __init__(self, ctx: RunContext, flow: Dispatcher, prompts: Sequence[PromptItem]) -> None:
        self.ctx, self.cfg, self._flow, self._prompts = ctx, ctx.cfg, flow, prompts
        self.records: list[dict[str, Any]] = []
        self._sink: _Sink | None = None
        self.media: Media | None = None  # the kept takes of the last evaluation, for trackers
        self._weights = self.cfg.reward_weights

    @property
    def tag(self) -> Literal["train", "ema"]:
        return self.cfg.eval_weights_tag

    def due(self, step: int) -> bool:
        """Before training, every `evaluation.every` steps and after the last one, once each."""
        if not self._prompts or any(record["step"] == step for record in self.records):
            return False
        every = self.cfg.evaluation.every
        return step == 0 or step >= self.cfg.run.steps or (every > 0 and step % every == 0)

    @property
    def progress(self) -> tuple[int, int]:
        """Groups scored and groups in all, of the present evaluation."""
        return (len(self._sink.jobs), self._sink.groups) if self._sink is not None else (0, 0)

    async def run(self, version: PolicyVersion) -> dict[str, Any]:
        """Evaluates `version`; writes evals.jsonl and the shown takes. Raises `RunFailed`."""
        step = version.number
        works = eval_works(self.cfg, self._prompts, step)
        shown = {p.index for p in self._prompts[:SHOWN_PROMPTS]}
        sink = self._sink = _Sink(version, len(works), self.cfg.faults.max_attempts, shown)
        # Takes are appended, and a run that was stopped here may have left some.
        shutil.rmtree(self.ctx.run.eval_takes(step), ignore_errors=True)
        try:
            for work in works:
                await self._flow.submit(Job(work=work, sink=sink, score_seed=None))
            await sink.done.wait()
            jobs = [sink.jobs[group] for group in sorted(sink.jobs)]
            await self._keep(jobs, shown, step)
            record = {"step": step, "tag": version.tag, **self._summary(jobs)}
        finally:
            sink.close()
            self._sink = None
        self.records.append(record)
        self.write()
        log.info("step %d: %s (%d prompts)", step, with_error(record["mean"], record["se"]), record["n"])
        return record

    async def _keep(self, jobs: list[Job], shown: set[int], step: int) -> None:
        """A table row per take; media files of the shown prompts only."""
        from pipeline.core.takes_table import save_takes

        kept_frames, fps = [], 1.0
        for job in jobs:
            keep = [prompt.index in shown for prompt in job.work.prompts]
            media = await self._shown(job) if any(keep) else None
            job.media = None
            keep = [media is not None and shown for shown in keep]
            await asyncio.to_thread(
                save_takes,
                self.ctx.run.eval_takes(step),
                media,
                job.work.prompts,
                job.work.seeds,
                job.meta.version,
                job.scores,
                step=step,
                weights=self._weights,
                keep=keep,
            )
            if media is not None:
                kept_frames.append(media.frames[np.flatnonzero(keep)])
                fps = media.fps
        self.media = Media(frames=np.concatenate(kept_frames), fps=fps) if kept_frames else None

    async def _shown(self, job: Job) -> Media | None:
        """None: a node died with them. They are for the report only, and already scored."""
        try:
            return None if job.media is None else await job.media
        except Exception as error:
            if not is_lost(error):
                raise
            log.warning("takes of the report are gone: %s", describe(error), extra={"group": job.group})
            return None

    def _summary(self, jobs: list[Job]) -> dict[str, Any]:
        values = {name: np.concatenate([job.scores[name].values for job in jobs]) for name in self._weights}
        prompts = np.array([prompt.index for job in jobs for prompt in job.work.prompts])
        return summarise_scores(values, self._weights, prompts).record()

    def write(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        atomic_write(self.ctx.run.evals, lines.encode())
