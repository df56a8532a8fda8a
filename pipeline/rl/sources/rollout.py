"""Rollouts: takes of a prompt, drawn by the policy in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.core.prompts import load_prompts
from pipeline.core.types import GroupWork, PromptItem
from pipeline.rl.group_plan import train_work
from pipeline.rl.sources.base import Source, register

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.rl.noise_grid import NoiseGrid


@register("rollout")
class Rollout(Source):
    """Takes of the prompts in `prompts.train`, drawn by the policy in training."""

    def rows(self, cfg: Config) -> Sequence[PromptItem]:
        return load_prompts(cfg.prompts.train)

    def work(self, cfg: Config, group: int, step: int, row: PromptItem, grid: NoiseGrid | None = None) -> GroupWork:
        return train_work(cfg, group, step, row, grid=grid)
