"""Files of an evaluation's takes: media while other groups are still drawn, one group at a time, and the table last."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.group_run import GroupRun
from actors.ray_errors import describe, is_lost
from pipeline.core.types import Media, TakeCaption, TakeMeasurements

log = logging.getLogger("rushes.evaluation")


class HeldoutTakes:
    """The takes of one evaluation. `shown`: indices of the prompts whose media are kept, also for trackers;
    `keeps_all`: the media of all others are kept as files too."""

    def __init__(self, folder: Path, runs: Sequence[GroupRun], shown: set[int], keeps_all: bool) -> None:
        from pipeline.core.takes_table import number_takes

        # Takes are appended, and a run that was stopped here may have left some.
        shutil.rmtree(folder, ignore_errors=True)
        self._folder, self._shown, self._keeps_all = folder, shown, keeps_all
        self._runs = runs
        counted: dict[int, int] = {}
        self._numbers = {run.group: number_takes(run.work.prompts, counted) for run in runs}
        self._files: dict[int, list[Path | None]] = {}  # by group
        self._frames: dict[int, np.ndarray] = {}  # of the shown takes, by group
        self._fps = 1.0
        self._one_group, self._waiting = asyncio.Lock(), 0  # one in this process's memory, others in the object store

    async def room(self) -> None:
        """Waits while more than two groups wait to be written: the object store must not fill with them."""
        while self._waiting > 2:
            async with self._one_group:  # in turn: after those that wait
                pass

    async def add(self, run: GroupRun) -> None:
        """Writes the media that are kept of a scored group, and lets go of them."""
        from pipeline.core.takes_table import write_takes

        reference, run.media = run.media, None
        shown = [prompt.index in self._shown for prompt in run.work.prompts]
        if reference is None or not (self._keeps_all or any(shown)):
            return
        self._waiting += 1
        async with self._one_group:
            self._waiting -= 1
            try:
                media: Media = await reference
            except Exception as error:  # a node died with them: they are for the report alone, and already scored
                if not is_lost(error):
                    raise
                log.warning("takes of the report are gone: %s", describe(error), extra={"group": run.group})
                return
            keep = [self._keeps_all or each for each in shown]
            numbers = self._numbers[run.group]
            files = await asyncio.to_thread(write_takes, self._folder, media, run.work.prompts, numbers, keep)
            self._files[run.group] = files
            if any(shown):
                self._frames[run.group], self._fps = media.frames[np.flatnonzero(shown)], media.fps

    async def write_table(
        self,
        runs: Sequence[GroupRun],
        measured: TakeMeasurements,
        values: Mapping[str, np.ndarray],
        weights: Mapping[str, float],
        step: int,
    ) -> None:
        """A row per take, with its scores and measurements (`values` [N], in the groups' order)."""
        from pipeline.core.takes_table import save_takes

        first = 0
        for run in runs:
            of_group = slice(first, first + run.work.takes)
            first = of_group.stop
            columns: dict[str, list[Any]] = {f"guard/{name}": each[of_group].tolist() for name, each in values.items()}
            columns["descriptor"] = [each.tobytes() for each in measured.descriptors[of_group]]
            await asyncio.to_thread(
                save_takes,
                self._folder,
                None,
                run.work.prompts,
                run.work.seeds,
                run.meta.version,
                run.scores,
                step=step,
                weights=weights,
                more_columns=columns,
                files=self._files.get(run.group) or [None] * run.work.takes,
            )

    @property
    def shown_media(self) -> Media | None:
        """The takes of the shown prompts, in order; None where none could be kept."""
        frames = [self._frames[group] for group in self._numbers if group in self._frames]
        return Media(frames=np.concatenate(frames), fps=self._fps) if frames else None

    @property
    def captions(self) -> list[TakeCaption]:
        """Of `shown_media`, in its order; once the groups are scored."""
        return [
            TakeCaption(
                prompt=prompt.text,
                scores={n: float(s.values[k]) for n, s in run.scores.items() if not np.isnan(s.values[k])},
            )
            for run in self._runs
            if run.group in self._frames
            for k, prompt in enumerate(run.work.prompts)
            if prompt.index in self._shown
        ]
