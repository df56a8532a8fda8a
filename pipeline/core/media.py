"""Reads and writes media files: PyAV writes h264 mp4 and reads videos, PIL reads and writes pictures.

Small clips are enlarged by a whole factor for viewing. The factor and the original size are stored in the file, and
`read_media` undoes the enlargement, so that scorers see what was generated (up to h264's loss). Writes are atomic.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from pipeline.core.errors import InputError, RushesError, one_line
from pipeline.core.files import atomic_write
from pipeline.core.media_kinds import IMAGE_SUFFIXES, VIDEO_SUFFIXES, media_kind
from pipeline.core.pictures import read_frames
from pipeline.core.types import Media
from pipeline.core.videos import read_video

VIEW_PIXELS = 240  # smaller clips are enlarged by a whole factor to about this size
MAX_DECODED_BYTES = 4 * 2**30  # of one clip; or a quarter of the free memory, if that is less
_SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES
_TAG = "rushes-view:"


def view_scale(height: int, width: int) -> int:
    """Whole factor by which a small clip is enlarged for viewing. 1 or even: h264 halves the colour resolution, and
    even blocks keep the colour of every original pixel."""
    scale = VIEW_PIXELS // max(height, width)
    return max(1, scale - scale % 2)


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Nearest-neighbour enlargement of [..., H, W, 3] by a whole factor."""
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2) if scale > 1 else frames


def shrink(frame: np.ndarray, pixels: int) -> np.ndarray:
    """uint8 [H, W, 3] so that its longer side has `pixels` at most."""
    from PIL import Image

    scale = pixels / max(frame.shape[:2])
    if scale >= 1.0:
        return frame
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


# ------------------------------------------------------------------------------------------------------ writing


def encode_png(frame: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> PNG bytes (lossless, original size)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


def encode_mp4(frames: np.ndarray, fps: float, scale: int | None = None) -> bytes:
    """uint8 [F, H, W, 3] -> h264 mp4 bytes that browsers play (yuv420p, even sizes by edge padding).

    `scale`: whole enlargement; None picks `view_scale`.
    """
    import av

    count, height, width, _ = frames.shape
    if count == 0:
        raise ValueError("encode_mp4: no frames")
    scale = view_scale(height, width) if scale is None else scale
    big = enlarge(frames, scale)
    pad_h, pad_w = big.shape[1] % 2, big.shape[2] % 2
    if pad_h or pad_w:
        big = np.pad(big, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        container.metadata["comment"] = _TAG + json.dumps({"scale": scale, "height": height, "width": width})
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = big.shape[1], big.shape[2], "yuv420p"
        stream.options = {"crf": "15", "preset": "medium"}
        stream.codec_context.thread_count = 1  # same bytes everywhere, and no burst of threads
        for image in big:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """uint8 [F, H, W, 3] -> GIF bytes that loop, for viewers that play no mp4 (at most 50 frames a second)."""
    from PIL import Image

    first, *others = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    duration = max(20, round(1000 / fps))  # ms
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)
    return buffer.getvalue()


def write_media(path_stem: Path, media: Media, k: int) -> Path:
    """Writes take `k`: `<stem>.png` for one frame, `<stem>.mp4` otherwise. Returns the path."""
    frames = media.frames[k]
    stem = Path(path_stem)
    if frames.shape[0] == 1:
        path, data = stem.with_name(stem.name + ".png"), encode_png(frames[0])
    else:
        path, data = stem.with_name(stem.name + ".mp4"), encode_mp4(frames, media.fps)
    atomic_write(path, data)
    return path


# ------------------------------------------------------------------------------------------------------ reading


def list_media(path: Path) -> list[Path]:
    """The media files of a folder (recursively, sorted), or the file itself. Raises `InputError`."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    files, _ = _sorted_out(path)
    if not files:
        raise InputError(f"{path}: holds no images or videos ({' '.join(_SUFFIXES)})")
    return files


def left_out(path: Path) -> str:
    """'2 .tiff, 1 .json': the files of a folder that `list_media` leaves out, by suffix; '' if there are none.

    The prompt beside a picture (NAME.txt) and the tables that Rushes writes are not counted.
    """
    files, others = _sorted_out(Path(path))
    prompts = {file.with_suffix(".txt") for file in files}
    kinds = Counter(
        "hidden" if file.name.startswith(".") else file.suffix.lower() or "without suffix"
        for file in others
        if file not in prompts and file.suffix.lower() != ".parquet"
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _sorted_out(folder: Path) -> tuple[list[Path], list[Path]]:
    """(the media files below a folder, all other files), each sorted."""
    files: list[Path] = []
    others: list[Path] = []
    for file in sorted(file for file in folder.rglob("*") if not file.is_dir()):
        readable = file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file()
        (files if readable else others).append(file)
    return files, others


def read_media(path: Path) -> Media:
    """One file -> Media with K = 1, by its content whatever its name. Greyscale becomes RGB; alpha is composited over
    white. Raises `InputError`."""
    path = Path(path)
    kind = media_kind(path)
    if not kind.video:
        frames, fps = read_frames(path, kind, _decoded_limit)
        return Media(frames=frames[None], fps=fps)
    video = read_video(path, kind, _decoded_limit())
    return Media(frames=np.ascontiguousarray(_undo_view(video.frames, video.comment))[None], fps=video.fps)


def _decoded_limit() -> int:
    return min(MAX_DECODED_BYTES, psutil.virtual_memory().available // 4)


class View(NamedTuple):
    """How a clip was enlarged for viewing."""

    scale: int
    height: int  # before
    width: int


def view_of(comment: str) -> View | None:
    """What `encode_mp4` noted in a file's comment; None: another program wrote it."""
    if not comment.startswith(_TAG):
        return None
    try:
        view = json.loads(comment[len(_TAG) :])
        return View(int(view["scale"]), int(view["height"]), int(view["width"]))
    except (ValueError, KeyError, TypeError):
        return None


def _undo_view(frames: np.ndarray, comment: str) -> np.ndarray:
    """Averages the block that `encode_mp4` made of each pixel. [F, H*s, W*s, 3] -> [F, H, W, 3]."""
    view = view_of(comment)
    if view is None:
        return frames
    scale, height, width = view
    if scale < 1 or frames.shape[1] < height * scale or frames.shape[2] < width * scale:
        return frames  # resized since then
    blocks = frames[:, : height * scale, : width * scale]
    if scale == 1:
        return blocks
    blocks = blocks.reshape(len(frames), height, scale, width, scale, 3)
    return np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)


def h264_round_trip() -> float:
    """Encodes and decodes a small clip; returns the largest pixel error (0-255). Raises `RushesError` (doctor)."""
    import tempfile

    ramp = np.linspace(0, 255, 16, dtype=np.uint8)
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    frames[..., 0], frames[..., 1] = ramp[None, :, None], ramp[None, None, :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        try:
            path.write_bytes(encode_mp4(frames, 8.0))
        except Exception as error:  # a broken codec build raises many kinds
            raise RushesError(
                f"h264 cannot be written ({one_line(error, 120)}); reinstall with: pip install --force-reinstall av"
            ) from None
        back = read_media(path)
    if back.frames.shape != (1, *frames.shape):
        raise RushesError(f"a written clip came back as {back.frames.shape[1:]} instead of {frames.shape}")
    return float(np.abs(back.frames[0].astype(int) - frames.astype(int)).max())
