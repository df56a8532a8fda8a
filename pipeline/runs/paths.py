"""The folder of a run: its files, and its name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pipeline.core.errors import ConfigError, InputError
from pipeline.runs.records import read_summary

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class RunDir:
    """Paths inside runs/<name>/, and whether the run has finished."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evals(self) -> Path:
        return self.path / "evals.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    def eval_takes(self, step: int) -> Path:
        return self.path / "eval" / f"step-{step:06d}"

    def train_takes(self, step: int) -> Path:
        return self.path / "takes" / f"step-{step:06d}"

    @property
    def finished(self) -> bool:
        try:
            return read_summary(self.summary).get("status") == "finished"
        except InputError:
            return False


def default_name(config_path: Path, now: datetime, runs: Path) -> str:
    """`<config stem>-YYYYmmdd-HHMMSS`, with -2, -3, ... for runs in the folder `runs` that start in the same second."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", config_path.stem).strip("-.") or "run"
    name = f"{stem}-{now:%Y%m%d-%H%M%S}"
    number, unique = 1, name
    while (runs / unique).exists():
        number += 1
        unique = f"{name}-{number}"
    return unique


def check_name(name: str) -> None:
    """Raises `ConfigError` for a name that no run can have."""
    if not _RUN_NAME.fullmatch(name):
        raise ConfigError(
            f"run.name: {name!r} cannot be a folder's name; use letters, digits, '.', '_' and '-' (at most 100)"
        )
