"""Mix: one's own takes, and among them real ones, so that a model that learns from itself stays with the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline.config.sections.base import Count
from pipeline.core.types import GroupWork, PromptItem
from pipeline.rl.group_plan import train_work
from pipeline.rl.sources.base import register
from pipeline.rl.sources.clips import Clips
from pipeline.rl.sources.encoded import EncodedSource

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.rl.noise_grid import NoiseGrid


@register("mix")
class Mix(EncodedSource):
    """Of the captioned clips or pictures of `prompts.train`: takes of a caption, drawn by the policy in training, and
    in some groups the clips themselves, each of another caption, which all count the same (signal select)."""

    judged_by: ClassVar[frozenset[str]] = frozenset({"rewards", "labels"})

    own: Count = Field(3, description="Of each own + data groups, those whose takes are drawn.")
    data: Count = Field(1, description="Of each own + data groups, those whose takes are clips.")

    @property
    def clips(self) -> Clips:
        """Where the groups of clips come from."""
        return Clips(noise=0.0, distinct=True, fit=self.fit, largest_error=self.largest_error)

    def rows(self, cfg: Config) -> Sequence[PromptItem]:
        return self.clips.rows(cfg)

    def work(self, cfg: Config, group: int, step: int, row: PromptItem, grid: NoiseGrid | None = None) -> GroupWork:
        if group % (self.own + self.data) < self.own:
            return train_work(cfg, group, step, replace(row, clip=None), grid=grid)
        work = self.clips.work(cfg, group, step, row, grid)
        return replace(work, labels=(1.0,) * work.takes)
