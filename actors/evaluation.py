"""Evaluation on held-out prompts: fixed seeds, ODE sampler, centre frame picks, EMA weights where kept."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from actors.group_run import GroupFailed, GroupRun, GroupRunner, GroupState
from actors.ray_errors import describe, first_error, is_lost
from actors.ray_options import RunContext
from pipeline.core.errors import RunFailed
from pipeline.core.files import atomic_write
from pipeline.core.statistics import with_error
from pipeline.core.types import GroupWork, Media, PolicyVersion, PromptItem
from pipeline.rl.evaluation import summarise_scores
from pipeline.rl.group_plan import SHOWN_PROMPTS, eval_works
from pipeline.runs.snapshot import EvaluationProgress

log = logging.getLogger("rushes.evaluation")


class Evaluator:
    """Runs evaluations and keeps their records, which are also evals.jsonl."""

    def __init__(self, ctx: RunContext, runner: GroupRunner, prompts: Sequence[PromptItem]) -> None:
        self.ctx, self.cfg, self._runner, self._prompts = ctx, ctx.cfg, runner, prompts
        self.records: list[dict[str, Any]] = []
        self._runs: list[GroupRun] = []  # of the present evaluation
        self._version: PolicyVersion | None = None  # under evaluation; held here alone, so it is freed at the end
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
    def progress(self) -> EvaluationProgress:
        scored = sum(run.state is GroupState.SCORED for run in self._runs)
        return EvaluationProgress(scored=scored, groups=len(self._runs))

    async def run(self, version: PolicyVersion) -> dict[str, Any]:
        """Evaluates `version`; writes evals.jsonl and the shown takes. Raises `RunFailed`."""
        step = version.number
        shown = {prompt.index for prompt in self._prompts[:SHOWN_PROMPTS]}
        self._version = version
        self._runs = [GroupRun(work) for work in eval_works(self.cfg, self._prompts, step)]
        # Takes are appended, and a run that was stopped here may have left some.
        shutil.rmtree(self.ctx.run.eval_takes(step), ignore_errors=True)
        try:
            await self._score_all(shown, step)
            await self._keep(self._runs, shown, step)
            record = {"step": step, "tag": version.tag, **self._summary(self._runs)}
        finally:
            self._runs, self._version = [], None
        self.records.append(record)
        self.write()
        log.info("step %d: %s (%d prompts)", step, with_error(record["mean"], record["se"]), record["n"])
        return record

    async def _score_all(self, shown: set[int], step: int) -> None:
        """Every group must succeed: a mean over what is left would not be comparable. Raises `RunFailed`."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for run in self._runs:
                    await self._runner.room()
                    tasks.create_task(self._score(run, shown))
                    await asyncio.sleep(0)  # it is waiting for a worker before there is room for the next one
        except BaseExceptionGroup as failures:
            failure = first_error(failures)
            if not isinstance(failure, GroupFailed):
                raise failure from None
            raise RunFailed(
                f"the evaluation at step {step} failed after {failure.attempts} attempts in {failure.reason}"
            ) from None

    async def _score(self, run: GroupRun, shown: set[int]) -> None:
        await self._runner.run_group(run, self._policy)
        run.trajectory = None
        if not any(prompt.index in shown for prompt in run.work.prompts):
            run.media = None

    def _policy(self, _works: Sequence[GroupWork]) -> PolicyVersion:
        assert self._version is not None  # while groups are drawn
        return self._version

    async def _keep(self, runs: list[GroupRun], shown: set[int], step: int) -> None:
        """A table row per take; media files of the shown prompts only."""
        from pipeline.core.takes_table import save_takes

        kept_frames, fps = [], 1.0
        for run in runs:
            keep = [prompt.index in shown for prompt in run.work.prompts]
            media = await self._shown(run) if any(keep) else None
            run.media = None
            keep = [media is not None and is_shown for is_shown in keep]
            await asyncio.to_thread(
                save_takes,
                self.ctx.run.eval_takes(step),
                media,
                run.work.prompts,
                run.work.seeds,
                run.meta.version,
                run.scores,
                step=step,
                weights=self._weights,
                keep=keep,
            )
            if media is not None:
                kept_frames.append(media.frames[np.flatnonzero(keep)])
                fps = media.fps
        self.media = Media(frames=np.concatenate(kept_frames), fps=fps) if kept_frames else None

    async def _shown(self, run: GroupRun) -> Media | None:
        """The takes of a group, or None if a node died with them: they are for the report only, and already scored."""
        try:
            return None if run.media is None else await run.media
        except Exception as error:
            if not is_lost(error):
                raise
            log.warning("takes of the report are gone: %s", describe(error), extra={"group": run.group})
            return None

    def _summary(self, runs: list[GroupRun]) -> dict[str, Any]:
        values = {name: np.concatenate([run.scores[name].values for run in runs]) for name in self._weights}
        prompts = np.array([prompt.index for run in runs for prompt in run.work.prompts])
        return summarise_scores(values, self._weights, prompts).record()

    def write(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        atomic_write(self.ctx.run.evals, lines.encode())
