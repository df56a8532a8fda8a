"""Labelled: pairs of takes that were drawn and judged beforehand, by people or a reward; nothing is drawn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipeline.core.errors import ConfigError, InputError
from pipeline.core.prompts import load_prompts
from pipeline.core.types import GroupWork, PromptItem
from pipeline.rl.group_plan import train_work
from pipeline.rl.sources.base import register
from pipeline.rl.sources.encoded import CHECKED, EncodedSource

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.rl.noise_grid import NoiseGrid

log = logging.getLogger("rushes.source")


@register("labelled")
class Labelled(EncodedSource):
    """The pairs of `prompts.train`, a table of labelled pairs (`rushes label` writes one): encoded, not drawn.

    Ties are left out: an objective on pairs learns nothing from them. So are answers that repeat an earlier one.
    """

    judged_by: ClassVar[frozenset[str]] = frozenset({"labels"})

    @property
    def draws(self) -> bool:
        return False

    def rows(self, cfg: Config) -> Sequence[PromptItem]:
        path = cfg.prompts.train
        prompts = load_prompts(path)
        if not any(prompt.takes for prompt in prompts):
            raise InputError(
                f"{path}: is no table of labelled pairs, which source {self.name} needs: a parquet file with path_a, "
                "path_b (or bytes_a, bytes_b), label and prompt, as `rushes label` writes it"
            )
        rows = [prompt for prompt in prompts if len({take.label for take in prompt.takes}) > 1]
        if not rows:
            raise InputError(f"{path}: all {len(prompts)} pairs are ties, which teach nothing; label more")
        self._check_files(cfg, rows)
        return rows

    def _check_files(self, cfg: Config, rows: Sequence[PromptItem]) -> None:
        """A few bad files fail their groups when their turn comes; most of them bad is a mistake in the table's paths
        or the config. Raises `InputError`."""
        form = self.data_clips(cfg).form
        paths = list(dict.fromkeys(take.path for row in rows for take in row.takes))
        checked = paths[:: max(1, len(paths) // CHECKED)]
        problems = []
        for path in checked:
            try:
                form.check(Path(path))
            except InputError as error:
                problems.append(str(error))
        if not problems:
            return
        found = f"{len(problems)} of {len(checked)} takes that were looked at cannot be used"
        if 2 * len(problems) > len(checked):
            raise InputError(f"{cfg.prompts.train}: {found}; the first: {problems[0]}")
        log.warning("%s: %s, and their groups will fail; the first: %s", cfg.prompts.train, found, problems[0])

    def work(self, cfg: Config, group: int, step: int, row: PromptItem, grid: NoiseGrid | None = None) -> GroupWork:
        work = train_work(cfg, group, step, row, grid=grid, drawn=False)
        prompts = tuple(replace(row, clip=take.path, takes=()) for take in row.takes)
        return replace(work, prompts=prompts, labels=tuple(take.label for take in row.takes))

    def check(self, cfg: Config) -> None:
        if cfg.step.takes != 2:
            raise ConfigError(f"step.takes: found {cfg.step.takes}; the groups of source {self.name} are pairs: set 2")
