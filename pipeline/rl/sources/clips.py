"""Clips: takes that begin at a captioned clip of data, noised part of the way (InstructVideo, arXiv 2312.12490)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pipeline.config.sections.base import NonNegative
from pipeline.core.captioned_clips import ClipFormat, DataClips
from pipeline.core.errors import InputError
from pipeline.core.prompts import load_prompts, prompt_locations
from pipeline.core.types import Begin, GroupWork, PromptItem
from pipeline.rl.group_plan import check_begin, train_work
from pipeline.rl.sources.base import Source, register

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.rl.noise_grid import NoiseGrid

_CHECKED = 2000  # files whose heads are read at the start; what is wrong with others fails their groups


@register("clips")
class Clips(Source):
    """Captioned clips or pictures of `prompts.train`: encoded, noised, and denoised from there by the policy."""

    noise: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.6,
        description="Noise level tau that a clip is brought to. Flow models: the sampler's nearest level; others: the "
        "last round(tau * sampler.steps) steps are taken (InstructVideo: 12 of 20).",
    )
    offset_noise: NonNegative = Field(
        0.1, description="Std of further noise that is the same all over a frame's channel (InstructVideo: 0.1)."
    )
    fit: Literal["exact", "crop"] = Field(
        "exact", description="Clips of another size: refused, or scaled to cover the frame and cut to its middle."
    )
    largest_error: NonNegative = Field(
        12.0,
        description="Largest mean difference between a clip and its decoded encoding, in grey levels (0 to 255), when "
        "a rollout worker starts: above it, the VAE does not fit the data.",
    )

    def data_clips(self, cfg: Config) -> DataClips:
        generator = cfg.generator
        form = ClipFormat(generator.num_frames, generator.height, generator.width, generator.fps, self.fit)
        return DataClips(form, self.largest_error)

    def rows(self, cfg: Config) -> Sequence[PromptItem]:
        path, form = cfg.prompts.train, self.data_clips(cfg).form
        rows = load_prompts(path)
        for row in rows:
            if row.clip is None:
                raise InputError(
                    f"{path}, {prompt_locations(path)[row.index]}: names no clip, which source {self.name} needs; add "
                    "the column 'clip', or give a folder of captioned clips"
                )
        for row in rows[:: max(1, len(rows) // _CHECKED)]:
            form.check(Path(str(row.clip)))
        return rows

    def work(self, cfg: Config, group: int, step: int, row: PromptItem, grid: NoiseGrid | None = None) -> GroupWork:
        """Raises ValueError without a grid, which says where takes begin."""
        if grid is None:
            raise ValueError("takes of clips begin at a noise level: the pipeline has to be probed first")
        begin = Begin(step=grid.step_at(self.noise), offset_noise=self.offset_noise)
        return train_work(cfg, group, step, row, grid=grid, begin=begin)

    def check_grid(self, cfg: Config, grid: NoiseGrid) -> None:
        check_begin(cfg, grid, "source.noise", self.noise)
