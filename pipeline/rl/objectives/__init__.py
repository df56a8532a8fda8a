"""Objectives by name (`objective.name`): each file here registers one, and nothing else knows its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.rl.objectives.base import Objective

if TYPE_CHECKING:
    from pipeline.config.schema import Config

__all__ = ["Objective", "objective_of"]


def objective_of(cfg: Config) -> Objective:
    """The objective that a config chooses, with its options."""
    assert isinstance(cfg.objective, Objective)
    return cfg.objective
