"""A run at one moment, for whoever watches it: `rushes status`, `watch`, the progress of `rushes train`, experiments.

The controller makes it during the run (`actors.controller`). For a run that has ended, or whose controller cannot be
reached, the commands make it from the run's files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSummary:
    """The size of a worker pool."""

    ready: int  # workers that can take work, or have some
    busy: int
    target: int  # workers that it should have, including those that still start
    leaving: int  # busy for the last time
    min: int
    max: int
    reason: str  # of the last change of size


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationProgress:
    """Groups of the current evaluation; 0 of 0 outside of evaluations."""

    scored: int = 0
    groups: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSnapshot:
    """JSON-able through `to_dict`. The optional fields are empty in a snapshot made from a run's files."""

    state: str  # starting, training, evaluating, saving, stopping, ...: for display
    step: int  # optimisation steps completed
    steps: int  # in all
    records: list[dict[str, float]] = field(default_factory=list)  # metrics of steps, those the watcher has not seen
    recorded: int = 0  # steps whose metrics there have been, to ask for the next ones
    evals: list[dict[str, Any]] = field(default_factory=list)  # records of all evaluations
    eval_progress: EvaluationProgress = EvaluationProgress()
    host: str = ""  # of the controller
    activities: dict[str, str] = field(default_factory=dict)  # actor -> what it does, for display
    pids: dict[str, int] = field(default_factory=dict)  # actor -> process id, of those that are alive
    queues: dict[str, int] = field(default_factory=dict)  # queue -> groups that wait in it
    pools: dict[str, PoolSummary] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunSnapshot:
        """From `to_dict`. Keys of another version of Rushes are left out."""
        values = {each.name: data[each.name] for each in fields(cls) if each.name in data}
        values["eval_progress"] = EvaluationProgress(**data.get("eval_progress", {}))
        values["pools"] = {name: PoolSummary(**pool) for name, pool in data.get("pools", {}).items()}
        return cls(**values)
