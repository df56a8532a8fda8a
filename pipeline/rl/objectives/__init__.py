"""Objectives by name (`algorithm.objective`): each file here registers one, and nothing else knows its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.rl.objectives.base import (
    OBJECTIVES,
    DenoisingObjective,
    DenoisingTerms,
    Objective,
    PolicyLoss,
    TransitionObjective,
    TransitionTerms,
    register,
)

if TYPE_CHECKING:
    from pipeline.config.schema import Config

__all__ = [
    "DenoisingObjective",
    "DenoisingTerms",
    "Objective",
    "PolicyLoss",
    "TransitionObjective",
    "TransitionTerms",
    "get_objective",
    "register",
]


def get_objective(name: str) -> Objective:
    """Raises `ConfigError` with the nearest name."""
    return OBJECTIVES.get(name)


def objective_names() -> list[str]:
    return list(OBJECTIVES.all())


def check_objective(cfg: Config) -> None:
    """`algorithm.objective` names an objective, and its rules hold. Raises `ConfigError`."""
    get_objective(cfg.algorithm.objective).check(cfg)
