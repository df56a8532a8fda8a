"""Captioned clips and pictures as data: which files a folder holds, and their frames as a generator would make them.

A folder of clips is a prompt set (`pipeline.core.prompts`). Each file's caption stands in its `takes.parquet`, which
`rushes generate` and runs that keep takes write, or else in NAME.txt beside NAME.mp4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.core.errors import InputError
from pipeline.core.media import list_media, read_media, view_of
from pipeline.core.media_kinds import media_kind
from pipeline.core.pictures import picture_size
from pipeline.core.reading import read_text
from pipeline.core.safe_paths import path_inside
from pipeline.core.takes_table import TAKES_FILE, read_takes
from pipeline.core.videos import probe_video

_COPY = "a caption lies beside its clip: copy the text there"
_RATE_TOLERANCE = 0.02  # relative: the rate that a file states is rounded


def captioned_files(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, the columns `prompt` and `clip`) of each captioned clip of a folder, in order. A take whose media were
    not kept is left out. Raises `InputError`, also for a clip without a caption."""
    if (folder / TAKES_FILE).exists():
        for number, row in enumerate(read_takes(folder), start=1):
            if row.get("path") is not None:
                yield f"{TAKES_FILE}, row {number}", {"prompt": row["prompt"], "clip": row["path"]}
        return
    for file in list_media(folder):
        name, sidecar = str(file.relative_to(folder)), file.with_suffix(".txt")
        if not sidecar.is_file():
            raise InputError(f"{folder}, {name}: has no caption; write it to {sidecar.relative_to(folder)}")
        path_inside(folder, str(sidecar.absolute()), str(sidecar), _COPY)
        yield name, {"prompt": read_text(sidecar).strip(), "clip": name}


@dataclass(frozen=True, slots=True)
class ClipFormat:
    """The frames that a generator makes, as which clips are read."""

    frames: int  # F; 1: pictures
    height: int
    width: int
    fps: float
    fit: Literal["exact", "crop"] = "exact"  # crop: scaled to cover height x width, and its middle cut out

    def check(self, path: Path) -> None:
        """What a file's head tells of its length and size, without decoding it. Raises `InputError`."""
        kind = media_kind(path)
        if not kind.video:
            count, height, width = picture_size(path, kind)
            self._check_length(path, count, None)
            self._check_size(path, {(height, width), (width, height)})  # may be shown turned
            return
        head = probe_video(path, kind)
        self._check_length(path, head.frames, head.fps or None)
        whole = view_of(head.comment) or head  # the size before it was enlarged for viewing
        height, width = whole.height, whole.width
        self._check_size(path, {(height, width), (width, height)})

    def read(self, path: Path) -> np.ndarray:
        """uint8 [F, H, W, 3]: from the first frame on, at the generator's rate. Raises `InputError`."""
        media = read_media(path)
        frames = media.frames[0]
        self._check_length(path, len(frames), media.fps)
        chosen = frames[self._positions(media.fps)]
        self._check_size(path, {chosen.shape[1:3]})
        return chosen if chosen.shape[1:3] == (self.height, self.width) else self._cropped(chosen)

    def _positions(self, fps: float) -> np.ndarray:
        """Int64 [F]: of the frames nearest to the generator's times."""
        ratio = fps / self.fps if self.frames > 1 else 1.0
        if abs(ratio - 1.0) <= _RATE_TOLERANCE:
            ratio = 1.0
        return np.floor(np.arange(self.frames) * ratio + 0.5).astype(np.int64)

    def _check_length(self, path: Path, count: int, fps: float | None) -> None:
        """`fps`: of the file; None: not known."""
        if self.frames > 1 and fps is not None and fps < (1.0 - _RATE_TOLERANCE) * self.fps and count >= self.frames:
            raise InputError(
                f"{path}: shows {fps:.4g} frames a second, and the generator {self.fps:g}; set generator.fps to "
                f"{fps:.4g} or less, or write the clip at a higher rate"
            )
        positions = self._positions(fps or self.fps)
        if count <= positions[-1]:
            at = (
                f" at {self.fps:g} a second ({positions[-1] + 1} of the clip's own)"
                if positions[-1] >= len(positions)
                else ""
            )
            raise InputError(
                f"{path}: has {count} frame{'s' if count != 1 else ''}, and the generator makes {self.frames}{at}; "
                "give a longer clip or lower generator.num_frames"
            )

    def _check_size(self, path: Path, sizes: set[tuple[int, int]]) -> None:
        """`sizes`: (height, width), one of which the file has."""
        if self.fit == "exact" and (self.height, self.width) not in sizes:
            height, width = min(sizes, key=lambda size: abs(size[0] / size[1] - self.height / self.width))
            raise InputError(
                f"{path}: is {width}x{height}, and the generator makes {self.width}x{self.height}; set source.fit=crop "
                "to scale and cut clips, or write them in that size"
            )

    def _cropped(self, frames: np.ndarray) -> np.ndarray:
        from PIL import Image

        height, width = frames.shape[1:3]
        scale = max(self.height / height, self.width / width)
        cut_height, cut_width = self.height / scale, self.width / scale  # in pixels of the file
        top, left = (height - cut_height) / 2, (width - cut_width) / 2
        box = (left, top, left + cut_width, top + cut_height)
        size = (self.width, self.height)
        resized = [Image.fromarray(each).resize(size, Image.Resampling.BICUBIC, box) for each in frames]
        return np.stack([np.asarray(each) for each in resized])


@dataclass(frozen=True, slots=True)
class DataClips:
    """How a run uses clips of data."""

    form: ClipFormat
    largest_error: float  # grey levels, of a decoded encoding, on average
