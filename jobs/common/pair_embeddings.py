"""The pairs of a table as a CLIP sees them, for `rushes fit-reward`: what is used, and what is dropped and why."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jobs.common.judged_pairs import Pair, read_pairs
from jobs.common.score_files import Item
from pipeline.config.sections.rewards import SegmentsConfig
from pipeline.core.errors import InputError, RushesError
from pipeline.core.media import read_media
from pipeline.core.types import Media
from pipeline.rewards.fitting.embed import embed_takes
from pipeline.rewards.fitting.fit import EmbeddedPairs

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from pipeline.rewards.models.clip import ClipEmbedder

BATCH = 64  # takes embedded at once
BATCH_BYTES = 256 * 2**20


@dataclass
class Dropped:
    """Reason -> how many answers, and the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def lines(self) -> list[str]:
        return [f"dropped {count}: {reason} (first: {self.first[reason]})" for reason, count in self.counts.items()]


def embed_pairs(
    table: Path, clip: ClipEmbedder, raters: Collection[str], console: Console
) -> tuple[EmbeddedPairs, Dropped]:
    """`raters`: whose answers count; empty: everybody's. Each file is read and embedded once, a few at a time. Raises
    `InputError` where nothing is left."""
    dropped = Dropped()
    with tempfile.TemporaryDirectory(prefix="rushes-fit-") as folder:
        judged = [pair for pair in read_pairs(table, Path(folder)) if _counts(pair, raters, dropped)]
        items = {item.name: item for pair in judged for item in (pair.a, pair.b)}
        rows, problems = _embed_items(list(items.values()), clip, console)
    used = []
    for pair in judged:
        broken = next((item.name for item in (pair.a, pair.b) if item.name in problems), None)
        if broken is not None:
            dropped.add("a take cannot be read", f"row {pair.row}: {problems[broken]}")
        else:
            used.append(pair)
    if not used:
        raise InputError(f"{table}: no pair is left to fit to; " + ("; ".join(dropped.lines()) or "it holds no rows"))
    return _arrays(used, rows, clip), dropped


def _counts(pair: Pair, raters: Collection[str], dropped: Dropped) -> bool:
    where, answer = f"row {pair.row}", pair.answer
    if raters and (answer is None or answer.rater not in raters):
        dropped.add("another rater", where)
    elif answer is not None and answer.repeat_of is not None:
        dropped.add("a repeat of an earlier answer", where)
    elif not pair.a.prompt.strip():
        dropped.add("no prompt", where)
    elif pair.a.name == pair.b.name:
        dropped.add("twice the same take", where)
    else:
        return True
    return False


def _embed_items(
    items: list[Item], clip: ClipEmbedder, console: Console
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(embedding [D] by name, what is wrong with the others by name)."""
    from rich.progress import Progress

    rows: dict[str, torch.Tensor] = {}
    problems: dict[str, str] = {}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("embedding", total=len(items))
        for names, media in _batches(items, problems):
            rows |= zip(names, embed_takes(clip, media, SegmentsConfig()), strict=True)
            progress.update(bar, completed=len(rows) + len(problems))
    return rows, problems


def _batches(items: list[Item], problems: dict[str, str]) -> Iterator[tuple[list[str], Media]]:
    """Consecutive takes of one shape and frame rate."""
    names: list[str] = []
    batch: list[Media] = []
    for item in items:
        try:
            if item.error is not None:
                raise InputError(item.error)
            media = read_media(item.path)
        except RushesError as error:
            problems[item.name] = str(error)
            continue
        full = len(batch) == BATCH or (len(batch) + 1) * media.frames.nbytes > BATCH_BYTES
        if batch and (full or (batch[0].frames.shape, batch[0].fps) != (media.frames.shape, media.fps)):
            yield names, _joined(batch)
            names, batch = [], []
        names.append(item.name)
        batch.append(media)
    if batch:
        yield names, _joined(batch)


def _joined(batch: list[Media]) -> Media:
    return Media(frames=np.concatenate([media.frames for media in batch]), fps=batch[0].fps)


def _arrays(pairs: list[Pair], rows: dict[str, torch.Tensor], clip: ClipEmbedder) -> EmbeddedPairs:
    import torch

    takes = {name: index for index, name in enumerate(rows)}
    prompts = {text: index for index, text in enumerate(dict.fromkeys(pair.a.prompt for pair in pairs))}
    names = [pair.answer.rater if pair.answer is not None else "" for pair in pairs]
    raters = tuple(sorted(set(names)))
    return EmbeddedPairs(
        images=torch.stack(list(rows.values())),
        texts=clip.texts(list(prompts))[0].cpu(),
        a=np.array([takes[pair.a.name] for pair in pairs]),
        b=np.array([takes[pair.b.name] for pair in pairs]),
        prompt=np.array([prompts[pair.a.prompt] for pair in pairs]),
        label=np.array([pair.label for pair in pairs]),
        rater=np.array([raters.index(name) for name in names]),
        raters=raters,
    )
