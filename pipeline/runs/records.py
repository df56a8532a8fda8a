"""The records that a run leaves behind, as types: the lines of metrics.jsonl and evals.jsonl, summary.json.

Whoever reads them (`status`, `list`, `watch`, `report`, a resume) gets rows of these shapes or one error that names
file and line: a run's folder may come from another version, another program, or half a copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from pipeline.core.errors import CheckpointError, InputError
from pipeline.core.reading import parse_json_object, read_json_object, text_lines
from pipeline.core.records import FIX, Record, Whole, check_record


class EstimateRecord(Record):
    """A mean over prompts with its standard error (null for a single prompt)."""

    mean: FiniteFloat
    se: FiniteFloat | None = None
    ci95: FiniteFloat | None = None
    n: Whole = 0
    prompt_means: list[FiniteFloat | None] | None = None


class ChangesRecord(Record):
    """`pipeline.rl.evaluation.Changes`."""

    reward: EstimateRecord | None = None
    rewards: dict[str, EstimateRecord] = {}
    guards: dict[str, EstimateRecord] = {}


class SuspectRecord(Record):
    name: str
    kind: str
    before: FiniteFloat
    after: FiniteFloat
    since: Whole = 0


class VerdictRecord(Record):
    """`pipeline.runs.verdict.Verdict`."""

    kind: str
    text: str
    suspects: list[SuspectRecord] = []


class EvaluationRecord(EstimateRecord):
    """A line of evals.jsonl."""

    step: Whole
    tag: str = ""
    rewards: dict[str, EstimateRecord] | None = None
    prompts: list[Whole] | None = None  # indices of the prompts of all prompt_means
    guards: dict[str, EstimateRecord] | None = None
    changes: ChangesRecord | None = None  # against the first evaluation, paired
    verdict: VerdictRecord | None = None


class Position(Record):
    """Any line of metrics.jsonl or evals.jsonl, for whoever needs no more than its step."""

    step: Whole


class StepRecord(BaseModel):
    """A line of metrics.jsonl: numbers by name."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, FiniteFloat]

    step: Whole
    time: FiniteFloat | None = None


class TrainingRecord(StepRecord):
    """The line of a training step (`is_training`). No `reward/mean`: no reward scored its takes."""

    reward: FiniteFloat | None = Field(None, alias="reward/mean")
    takes_per_s: FiniteFloat
    step_s: FiniteFloat = Field(alias="time/step")
    rollout_s: FiniteFloat = Field(alias="time/rollout")
    score_s: FiniteFloat = Field(alias="time/score")
    learn_s: FiniteFloat = Field(alias="time/learn")
    sync_s: FiniteFloat = Field(alias="time/sync")


class BeforeAfter(Record):
    before: EstimateRecord | None = None
    after: EstimateRecord | None = None
    difference: EstimateRecord | None = None


class HeldoutRecord(BeforeAfter):
    rewards: dict[str, BeforeAfter] | None = None


class SummaryRecord(Record):
    """summary.json."""

    status: str = ""
    heldout: HeldoutRecord | None = None
    verdict: VerdictRecord | None = None
    ended: str = ""  # before run.steps: when and why
    exported_step: Whole | None = None
    takes: Whole | None = None
    groups: dict[str, Whole] | None = None
    wall_s: FiniteFloat | None = None
    peak_rss_mb: FiniteFloat | None = None
    seeds: dict[str, int] | None = None
    versions: dict[str, str] | None = None
    checkpoint: str | None = None
    export: str | None = None


class StateRecord(Record):
    """state.json of a checkpoint."""

    learner: dict[str, Any]
    controller: dict[str, Any]


class IdentityRecord(Record):
    """identity.json of a checkpoint."""

    config: dict[str, Any]
    digest: str
    prompts: dict[str, str] = {}


def read_records(path: Path, kind: type[BaseModel]) -> list[dict[str, Any]]:
    """The rows of a .jsonl file as they stand there, each checked to be of the `kind` ([] if it is not there).

    A last line without its end, cut off when the run was killed, is left out. Raises `InputError` naming file and line.
    """
    if not path.exists():
        return []
    lines = list(text_lines(path))
    rows = []
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_json_object(line, where, "restore the file from a copy, or remove the line")
        except InputError:
            if number == len(lines):
                break
            raise
        check_record(kind, row, where)
        rows.append(row)
    return rows


def is_training(row: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl belongs to a training step; evaluations have lines of their own."""
    return "loss" in row or "reward/mean" in row


def read_training(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that belong to training steps. Raises `InputError`."""
    rows = [row for row in read_records(path, StepRecord) if is_training(row)]
    for row in rows:
        check_record(TrainingRecord, row, f"{path}, step {row['step']}")
    return rows


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json; {} if it is not there. Raises `InputError`."""
    if not path.exists():
        return {}
    summary = read_json_object(path, FIX)
    check_record(SummaryRecord, summary, str(path))
    return summary


def read_state_file(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises `CheckpointError`."""
    state = read_json_object(path, "copy the checkpoint again", lenient=True, limit=2**30, error=CheckpointError)
    check_record(StateRecord, state, str(path), CheckpointError)
    return state
