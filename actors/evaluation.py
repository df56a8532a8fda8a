"""Evaluation on held-out prompts: fixed seeds, ODE sampler, centre frame picks, EMA weights where kept."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from actors.group_run import GroupFailed, GroupRun, GroupRunner, GroupState
from actors.heldout_takes import HeldoutTakes
from actors.ray_errors import first_error
from actors.ray_options import RunContext
from pipeline.core.errors import RunFailed
from pipeline.core.files import atomic_write
from pipeline.core.statistics import with_error
from pipeline.core.types import GroupWork, Media, PolicyVersion, PromptItem, TakeCaption, TakeMeasurements
from pipeline.rewards import guards
from pipeline.rl.evaluation import changes, summarise_scores
from pipeline.rl.group_plan import SHOWN_PROMPTS, eval_works
from pipeline.runs.snapshot import EvaluationProgress
from pipeline.runs.verdict import judge, tolerances

log = logging.getLogger("rushes.evaluation")


class Evaluator:
    """Runs evaluations and keeps their records, which are also evals.jsonl."""

    def __init__(self, ctx: RunContext, runner: GroupRunner, prompts: Sequence[PromptItem]) -> None:
        self.ctx, self.cfg, self._runner, self._prompts = ctx, ctx.cfg, runner, prompts
        self.records: list[dict[str, Any]] = []
        self._runs: list[GroupRun] = []  # of the present evaluation
        self._version: PolicyVersion | None = None  # under evaluation; held here alone, so it is freed at the end
        self.media: Media | None = None  # the kept takes of the last evaluation, for trackers
        self.captions: list[TakeCaption] = []
        self._weights = self.cfg.reward_weights

    @property
    def shown_records(self) -> list[dict[str, Any]]:
        """The records without what they hold of each prompt, for whoever watches the run."""
        details = ("prompt_means", "prompts", "guards", "changes", "rewards")
        return [{key: value for key, value in record.items() if key not in details} for record in self.records]

    @property
    def best_step(self) -> int | None:
        """The evaluated step with the highest mean of `Config.best_by`, the first of equals; None: none is kept."""
        name = self.cfg.best_by
        judged = [record for record in self.records if name in record["rewards"]]
        return max(judged, key=lambda record: record["rewards"][name]["mean"])["step"] if judged else None

    @property
    def ended(self) -> str:
        """Why the run ends before run.steps, by its last evaluation; "": it does not."""
        action, last = self.cfg.evaluation.on_suspect, self.records[-1] if self.records else {}
        suspect = (last.get("verdict") or {}).get("kind") == "suspect"
        return f"{last['verdict']['text']} (evaluation.on_suspect: {action})" if suspect and action != "warn" else ""

    def exported_step(self, last: int) -> int:
        """Of the policy that is exported after step `last`: the best one where asked for."""
        rolled_back = self.ended and self.cfg.evaluation.on_suspect == "rollback"
        best = self.best_step
        return best if best is not None and (rolled_back or self.cfg.evaluation.keep_best is not None) else last

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
        ends = step == 0 or step >= self.cfg.run.steps
        takes = HeldoutTakes(self.ctx.run.eval_takes(step), self._runs, shown, keeps_all=ends)
        try:
            await self._score_all(takes, step)
            measured, values = await self._measured(self._runs, step)
            await takes.write_table(self._runs, measured, values, self._weights, step)
            self.media, self.captions = takes.shown_media, takes.captions
            record = {"step": step, "tag": version.tag, **summary_record(self._runs, self._weights, values)}
        finally:
            self._runs, self._version = [], None
        self.records.append(record)
        log.info("step %d: %s (%d prompts)", step, with_error(record["mean"], record["se"]), record["n"])
        if (verdict := judge(self.records, self._weights, tolerances(self.cfg))) is not None:
            record |= {"changes": changes(self.records[0], record).record(), "verdict": verdict.record()}
            log.log(logging.WARNING if verdict.kind == "suspect" else logging.INFO, "step %d: %s", step, verdict.text)
        self.write()
        return record

    async def _score_all(self, takes: HeldoutTakes, step: int) -> None:
        """Every group must succeed: a mean over what is left would not be comparable. Raises `RunFailed`."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for run in self._runs:
                    await self._runner.room()
                    await takes.room()
                    tasks.create_task(self._score(run, takes))
                    await asyncio.sleep(0)  # it is waiting for a worker before there is room for the next one
        except BaseExceptionGroup as failures:
            failure = first_error(failures)
            if not isinstance(failure, GroupFailed):
                raise failure from None
            raise RunFailed(
                f"the evaluation at step {step} failed after {failure.attempts} attempts in {failure.reason}"
            ) from None

    async def _score(self, run: GroupRun, takes: HeldoutTakes) -> None:
        await self._runner.run_group(run, self._policy)
        run.trajectory = None
        await takes.add(run)

    def _policy(self, _works: Sequence[GroupWork]) -> PolicyVersion:
        assert self._version is not None  # while groups are drawn
        return self._version

    async def _measured(self, runs: list[GroupRun], step: int) -> tuple[TakeMeasurements, dict[str, np.ndarray]]:
        """The descriptors of all takes, and every measurement [N] of them, also those that compare takes."""
        found = [run.meta.measured for run in runs]
        measured = guards.merged([each for each in found if each is not None])
        prompts = np.array([prompt.index for run in runs for prompt in run.work.prompts])
        start = None if step == 0 else await asyncio.to_thread(self._start_of, runs)
        return measured, measured.values | guards.across(measured.descriptors, prompts, start)

    def _start_of(self, runs: list[GroupRun]) -> np.ndarray | None:
        """Descriptors of the same prompts and seeds before training; None where their table does not have them all."""
        from pipeline.core.takes_table import TAKES_FILE, read_takes

        folder = self.ctx.run.eval_takes(0)
        if not (folder / TAKES_FILE).exists():
            return None
        rows = read_takes(folder)
        kept = {(row["prompt_index"], row["seed"]): row.get("descriptor") for row in rows}
        works = [run.work for run in runs]
        takes = [(prompt.index, seed) for work in works for prompt, seed in zip(work.prompts, work.seeds, strict=True)]
        found = [descriptor for take in takes if (descriptor := kept.get(take)) is not None]
        return np.stack([np.frombuffer(each, np.uint8) for each in found]) if len(found) == len(takes) else None

    def write(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        atomic_write(self.ctx.run.evals, lines.encode())


def summary_record(
    runs: Sequence[GroupRun], weights: Mapping[str, float], measured: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """The record of scored groups, but for its step and tag. `measured`: measurement -> [N], in the groups' order."""
    values = {name: np.concatenate([run.scores[name].values for run in runs]) for name in weights}
    prompts = np.array([prompt.index for run in runs for prompt in run.work.prompts])
    return summarise_scores(values, weights, prompts, measured).record()
