"""Clips: takes that begin at a captioned clip of data, noised part of the way (InstructVideo, arXiv 2312.12490), or are
the clips themselves."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from pipeline.config.sections.base import NonNegative
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.prompts import load_prompts, prompt_locations
from pipeline.core.types import Begin, GroupWork, PromptItem
from pipeline.rl.group_plan import check_begin, train_work
from pipeline.rl.signals import signal_of
from pipeline.rl.sources.base import register
from pipeline.rl.sources.encoded import CHECKED, EncodedSource

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.rl.noise_grid import NoiseGrid

_OTHERS = 0xC1  # separates the choice of a group's further clips from other random numbers


@register("clips")
class Clips(EncodedSource):
    """Captioned clips or pictures of `prompts.train`: encoded, noised, and denoised from there by the policy; or, with
    noise 0, taken as they are."""

    noise: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.6,
        description="Noise level tau that a clip is brought to. Flow models: the sampler's nearest level; others: the "
        "last round(tau * sampler.steps) steps are taken (InstructVideo: 12 of 20). 0: nothing is drawn, the clips are "
        "the takes.",
    )
    distinct: bool = Field(
        False,
        description="Each take of a group is another clip with its own caption, instead of all being of one: for "
        "objectives that do not compare a prompt's takes.",
    )
    offset_noise: NonNegative = Field(
        0.1, description="Std of further noise that is the same all over a frame's channel (InstructVideo: 0.1)."
    )

    def rows(self, cfg: Config) -> Sequence[PromptItem]:
        path, form = cfg.prompts.train, self.data_clips(cfg).form
        rows = load_prompts(path)
        for row in rows:
            if row.clip is None:
                raise InputError(
                    f"{path}, {prompt_locations(path)[row.index]}: names no clip, which source {self.name} needs; add "
                    "the column 'clip', or give a folder of captioned clips"
                )
        for row in rows[:: max(1, len(rows) // CHECKED)]:
            form.check(Path(str(row.clip)))
        if self.distinct and len(rows) < cfg.step.takes:
            raise ConfigError(
                f"step.takes: found {cfg.step.takes}, and {path} has {len(rows)} clips; with source.distinct each take "
                "is another one: set step.takes lower, or give more clips"
            )
        return rows

    def work(self, cfg: Config, group: int, step: int, row: PromptItem, grid: NoiseGrid | None = None) -> GroupWork:
        """Raises ValueError where takes begin at a noise level and there is no grid, which says where that is."""
        if self.draws:
            if grid is None:
                raise ValueError("takes of clips begin at a noise level: the pipeline has to be probed first")
            begin = Begin(step=grid.step_at(self.noise), offset_noise=self.offset_noise)
            work = train_work(cfg, group, step, row, grid=grid, begin=begin)
        else:
            work = train_work(cfg, group, step, row, grid=grid, drawn=False)
        return replace(work, prompts=self._distinct(cfg, group, row)) if self.distinct else work

    def _distinct(self, cfg: Config, group: int, row: PromptItem) -> tuple[PromptItem, ...]:
        """[K]: the row, and others that are drawn for the group."""
        rows = _rows_once(cfg.prompts.train)
        others = np.random.default_rng(np.random.SeedSequence([cfg.run.seed, group, _OTHERS])).permutation(len(rows))
        chosen = [rows[i] for i in others if rows[i].index != row.index][: cfg.step.takes - 1]
        return (row, *chosen)

    @property
    def draws(self) -> bool:
        return self.noise > 0.0

    @property
    def several_prompts(self) -> bool:
        return self.distinct

    def check_grid(self, cfg: Config, grid: NoiseGrid) -> None:
        if self.draws:
            check_begin(cfg, grid, "source.noise", self.noise)

    def check(self, cfg: Config) -> None:
        super().check(cfg)
        if self.distinct and signal_of(cfg).gives != "none":
            raise ConfigError(
                f"source.distinct: signal {signal_of(cfg).name} compares the takes of a prompt, and each would be of "
                "another one; set source.distinct=false, or signal.name=none"
            )


@functools.lru_cache(maxsize=1)
def _rows_once(path: Path) -> tuple[PromptItem, ...]:
    """The rows of a run, which do not change while it lasts."""
    return tuple(load_prompts(path))
