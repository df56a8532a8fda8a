"""What a source is: where the takes of a training group come from.

A source turns a row of its data (a prompt) into the work of a group. It is a pure function of (run seed, group, step)
and of the pipeline's noise levels, so that a retry, another worker or a resumed run gives the same takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pipeline.config.parts import SOURCES, Part
from pipeline.core.types import GroupWork, PromptItem

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.core.captioned_clips import DataClips
    from pipeline.rl.noise_grid import NoiseGrid

register = SOURCES.register


class Source(Part, ABC):
    """Its fields are its options (`source.*`)."""

    judged_by: ClassVar[frozenset[str]] = frozenset({"rewards"})  # what says how good its takes are: rewards | labels

    @abstractmethod
    def rows(self, cfg: Config) -> Sequence[PromptItem]:
        """What groups are made of; visited in a new random order each epoch. Raises `InputError`."""

    @abstractmethod
    def work(self, cfg: Config, group: int, step: int, row: PromptItem, grid: NoiseGrid | None = None) -> GroupWork:
        """The group's K takes, to be consumed by optimisation step `step`. `grid`: of the probed pipeline."""

    @property
    def draws(self) -> bool:
        """Whether the policy draws the takes. False: they are data, which only an objective on finished takes can
        train on."""
        return True

    @property
    def several_prompts(self) -> bool:
        """Whether each take of a group is of another prompt."""
        return False

    def data_clips(self, cfg: Config) -> DataClips | None:
        """How the files that its rows name are read and encoded; None: takes begin from noise alone."""
        return None

    def check_grid(self, cfg: Config, grid: NoiseGrid) -> None:
        """Rules that concern the source and the probed pipeline's noise levels. Raises `ConfigError`."""
        return None

    def check(self, cfg: Config) -> None:
        """Rules of consistency that concern the source. Raises `ConfigError` naming the key and the fix."""
        return None
