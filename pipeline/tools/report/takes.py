"""The report's takes: held-out prompts before and after training, those that show what is suspect, and galleries.

Pictures are shown at their real size; small ones are enlarged by a whole factor, which their caption says.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import InputError, RushesError
from pipeline.core.media import encode_png, enlarge, read_media, shrink
from pipeline.core.safe_paths import file_inside
from pipeline.core.takes_table import TAKES_FILE, read_takes
from pipeline.rl.group_plan import SHOWN_PROMPTS
from pipeline.tools.report.record import COPY_IT, RunRecord

MAX_EMBEDDED = 40 * 2**20  # bytes of media inside the file; beyond it they are linked
THUMBNAIL = 72  # pixels, longer side of a segment's frame
SHOWING = 3  # takes that show what is suspect
SMALLEST = 192  # pixels, longer side to which smaller pictures are enlarged
TRAINING_STEPS, TRAINING_TAKES = 6, 12  # of the kept training takes: steps shown, and takes of each


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the kept takes below `root`, in order."""
    folders = []
    for folder in root.glob("step-*") if root.is_dir() else []:
        match = re.fullmatch(r"step-(\d+)", folder.name)
        if match and (folder / TAKES_FILE).exists():
            folders.append((int(match.group(1)), folder))
    return sorted(folders)


@dataclass(frozen=True, slots=True)
class KeptTake:
    """A row of a table, and where it stands."""

    step: int
    folder: Path
    row: dict[str, Any]


@dataclass(slots=True)
class _Pair:
    """A prompt and seed in the first kept evaluation and in the last one."""

    prompt: str
    seed: int
    before: KeptTake | None = None
    after: KeptTake | None = None

    def change(self, column: str) -> float | None:
        """Of a column of the table; None where one of both has none."""
        if self.before is None or self.after is None:
            return None
        before, after = self.before.row.get(column), self.after.row.get(column)
        return None if before is None or after is None else after - before


class Takes:
    """The takes of a run, for one report: embeds media until `embedded` bytes are in it, then links them."""

    def __init__(self, run: RunRecord, embedded: int = MAX_EMBEDDED) -> None:
        self.run, self.path, self._left = run, run.folder.path, embedded
        self._pairs = self._read_pairs()

    def pairs(self) -> list[dict[str, Any]]:
        """Per prompt: its first take in the first kept evaluation beside that in the last one."""
        firsts = [pair for pair in self._pairs if all(take.row.get("take", 0) == 0 for take in self._both(pair))]
        return [self._shown(pair) for pair in firsts[:SHOWN_PROMPTS]]

    def showing(self, columns: list[tuple[str, float]]) -> list[dict[str, Any]]:
        """The takes that changed most in the first of these columns (name, sign of the change) that takes have."""
        for column, sign in columns:
            changed = [(sign * change, pair) for pair in self._pairs if (change := pair.change(column)) is not None]
            if changed:
                changed.sort(key=lambda each: -each[0])
                return [self._shown(pair) | {"column": column.partition("/")[2] or column, "values": self._values(
                    pair, column)} for _, pair in changed[:SHOWING]]  # fmt: skip
        return []

    def gallery(self) -> list[dict[str, Any]]:
        """All kept held-out takes, before and after, small."""
        if len(self._pairs) <= SHOWN_PROMPTS:
            return []
        return [self._shown(pair, segments=False) for pair in self._pairs]

    def last_heldout(self) -> dict[tuple[int, str, int], KeptTake]:
        """The takes of the last kept evaluation, by prompt index, prompt and seed, in order; with files or without."""
        folders = step_folders(self.path / "eval")[-1:]
        takes = [take for step, folder in folders for take in self._rows(step, folder)]
        found = {(take.row["prompt_index"], take.row["prompt"], take.row["seed"]): take for take in takes}
        return dict(sorted(found.items()))

    def cell(self, take: KeptTake) -> dict[str, Any] | None:
        """The file of a take, as templates show it; None where none was written."""
        return self._cell(take, segments=False) if take.row.get("path") else None

    def training(self) -> list[dict[str, Any]]:
        """Kept training takes by step: the last few steps that kept some."""
        steps = []
        for step, folder in step_folders(self.path / "takes")[-TRAINING_STEPS:]:
            takes = [take for take in self._rows(step, folder) if take.row.get("path")]
            takes.sort(key=lambda take: (take.row["prompt_index"], take.row.get("take", 0)))
            cells = [self._cell(take, segments=False) for take in takes[:TRAINING_TAKES]]
            steps.append({"step": step, "cells": cells, "more": len(takes) - len(cells)})
        return steps

    # ------------------------------------------------------------------------------------------- reading

    def _read_pairs(self) -> list[_Pair]:
        folders = step_folders(self.path / "eval")
        ends = [folders[0]] if len(folders) == 1 else [*folders[:1], *folders[-1:]]
        pairs: dict[tuple[int, int], _Pair] = {}
        for side, (step, folder) in zip(("before", "after"), ends, strict=False):
            for take in self._rows(step, folder):
                row = take.row
                if row.get("path"):
                    pair = pairs.setdefault((row["prompt_index"], row["seed"]), _Pair(row["prompt"], row["seed"]))
                    setattr(pair, side, take)
        return [pairs[key] for key in sorted(pairs)]

    def _rows(self, step: int, folder: Path) -> list[KeptTake]:
        try:
            table = f"{folder.relative_to(self.path)}/{TAKES_FILE}"
            file_inside(self.path, table, str(self.path), COPY_IT)
            return [KeptTake(step, folder, row) for row in read_takes(folder)]
        except InputError as error:
            self.run.problems.append(str(error))
            return []

    # ------------------------------------------------------------------------------------------- cells

    @staticmethod
    def _both(pair: _Pair) -> list[KeptTake]:
        return [take for take in (pair.before, pair.after) if take is not None]

    def _shown(self, pair: _Pair, segments: bool = True) -> dict[str, Any]:
        shown: dict[str, Any] = {"prompt": pair.prompt, "seed": pair.seed}
        shown["before"] = self._cell(pair.before, segments) if pair.before else None
        shown["after"] = self._cell(pair.after, segments) if pair.after else None
        if (change := pair.change("reward")) is not None:
            shown["delta"] = change
        return shown

    @staticmethod
    def _values(pair: _Pair, column: str) -> tuple[float, float]:
        assert pair.before is not None and pair.after is not None  # it has a change
        return pair.before.row[column], pair.after.row[column]

    def _cell(self, take: KeptTake, segments: bool) -> dict[str, Any]:
        row, problems = take.row, self.run.problems
        try:
            path = file_inside(take.folder, row["path"], f"{take.folder / TAKES_FILE}: path", COPY_IT)
        except InputError as error:
            problems.append(str(error))
            path = None
        scores = {key[7:]: value for key, value in row.items() if key.startswith("reward/") and value is not None}
        cell: dict[str, Any] = {
            "step": take.step,
            "prompt": row["prompt"],
            "reward": row.get("reward"),
            "scores": scores,
            "video": path is not None and path.suffix == ".mp4",
            "src": None,
            "segments": [],
        }
        if path is None:
            return cell
        try:
            media = read_media(path)
            data = path.read_bytes()
        except (RushesError, OSError) as error:
            problems.append(str(error))
            return cell
        cell["src"] = self._source(path, data, "video/mp4" if cell["video"] else "image/png")
        height, width = media.frames.shape[2:4]
        factor = max(1, SMALLEST // max(height, width))
        cell |= {"width": width, "height": height, "factor": factor}
        cell["segments"] = _segments(row, media.frames[0]) if segments else []
        return cell

    def _source(self, path: Path, data: bytes, kind: str) -> str:
        if len(data) > self._left:
            return path.relative_to(self.path.absolute()).as_posix()
        self._left -= len(data)
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _segments(row: dict, frames: np.ndarray) -> list[dict[str, Any]]:
    """Per frame reward: the scored frames, with score and weight of their segment."""
    segments = []
    for key in row:
        if not key.startswith("segments/") or row[key] is None:
            continue
        name = key.removeprefix("segments/")
        weights, picks = row[f"segment_weights/{name}"], row[f"segment_frames/{name}"]
        total = sum(weights) or 1.0
        parts = [
            {
                "frames": [{"index": i, "src": thumbnail(frames[i])} for i in chosen if i < len(frames)],
                "score": score,
                "weight": weight,
                "share": weight / total,
            }
            for score, weight, chosen in zip(row[key], weights, picks, strict=True)
        ]
        segments.append({"name": name, "parts": parts})
    return segments


def thumbnail(frame: np.ndarray) -> str:
    """PNG data URI of uint8 [H, W, 3], about THUMBNAIL pixels."""
    longer = max(frame.shape[:2])
    whole = longer <= THUMBNAIL
    small = enlarge(frame, max(1, round(THUMBNAIL / longer))) if whole else shrink(frame, THUMBNAIL)
    return f"data:image/png;base64,{base64.b64encode(encode_png(small)).decode()}"
