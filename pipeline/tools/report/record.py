"""What a run's folder holds so far, read once for all parts of its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.errors import InputError
from pipeline.core.safe_paths import file_inside
from pipeline.runs.paths import RunDir
from pipeline.runs.records import EvaluationRecord, is_training, read_records, read_summary
from pipeline.runs.tracking import read_metrics

COPY_IT = "a report shows what lies in the run's own folder: copy the file there"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The parts of a run that a report shows. A part that is not there yet is None or empty."""

    folder: RunDir
    config: Config | None
    metrics: list[dict[str, Any]]  # a row per training step
    evals: list[dict[str, Any]]  # a row per evaluation
    summary: dict[str, Any]
    problems: list[str] = field(default_factory=list)  # files that could not be read, one line each

    @property
    def heldout(self) -> dict[str, Any]:
        """Held-out results as the summary has them."""
        return self.summary.get("heldout") or {}


def read_run(path: Path) -> RunRecord:
    """Raises `InputError` when it is no run folder, or when a file is broken or lies outside of it."""
    folder = RunDir(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder")
    if not folder.config.exists() and not folder.metrics.exists():
        raise InputError(f"{path}: is not a run folder (it has neither config.yaml nor metrics.jsonl)")
    for file in (folder.config, folder.metrics, folder.evals, folder.summary):
        if file.exists():
            file_inside(path, file.name, str(path), COPY_IT)
    return RunRecord(
        folder=folder,
        config=load_config(folder.config) if folder.config.exists() else None,
        metrics=[row for row in read_metrics(path) if is_training(row)],
        evals=read_records(folder.evals, EvaluationRecord),
        summary=read_summary(folder.summary),
    )
