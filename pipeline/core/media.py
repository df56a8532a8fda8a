"""Reads and writes media files: PyAV writes h264 mp4, decord reads it, PIL reads and writes pictures.

Small clips are enlarged by a whole factor for viewing. The factor and the original size are stored in the file, and
`read_media` undoes the enlargement, so that scorers see what was generated (up to h264's loss). Writes are atomic.
"""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from pipeline.core.errors import InputError, RushesError, one_line
from pipeline.core.files import atomic_write, describe_os_error
from pipeline.core.types import Media

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
VIEW_PIXELS = 240  # smaller clips are enlarged by a whole factor to about this size
MAX_DECODED_BYTES = 4 * 2**30  # of one clip; or a quarter of the free memory, if that is less
_TAG = "rushes-view:"
_UNDECODABLE = "cannot be decoded; the file is corrupt or cut off, write it again"


def view_scale(height: int, width: int) -> int:
    """Whole factor by which a small clip is enlarged for viewing. 1 or even: h264 halves the colour resolution, and
    even blocks keep the colour of every original pixel."""
    scale = VIEW_PIXELS // max(height, width)
    return max(1, scale - scale % 2)


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Nearest-neighbour enlargement of [..., H, W, 3] by a whole factor."""
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2) if scale > 1 else frames


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
    suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    files = sorted(
        p for p in path.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()
    )
    if not files:
        raise InputError(f"{path}: holds no images or videos ({' '.join(suffixes)})")
    return files


def read_media(path: Path) -> Media:
    """One file -> Media with K = 1. Greyscale becomes RGB; alpha is composited over white. Raises `InputError`."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, not a media file' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty (0 bytes); write it again")
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return Media(frames=_read_image(path)[None, None], fps=1.0)
    if suffix in VIDEO_SUFFIXES:
        return _read_video(path)
    raise InputError(f"{path}: unknown kind of file; give {' '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)}")


def on_white(image: PilImage) -> np.ndarray:
    """uint8 [H, W, 3] of a PIL picture; transparent parts become white."""
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"), dtype=np.uint8)


def _read_image(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image: Image.Image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # PIL would clip, not scale
                    grey = np.asarray(image, dtype=np.float64)
                    top = 65535.0 if grey.max(initial=0) > 255 else 255.0
                    grey8 = np.clip(np.rint(grey * (255.0 / top)), 0, 255).astype(np.uint8)
                    return np.repeat(grey8[..., None], 3, axis=-1)
                return on_white(image)
    except PermissionError as error:
        raise InputError(f"cannot read {describe_os_error(error, path)}") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: is not a picture, or is corrupt; write it again") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({one_line(error, 120)}); write it again") from None


def _read_video(path: Path) -> Media:
    info = _probe_video(path)
    size = info.frames * info.height * info.width * 3
    limit = min(MAX_DECODED_BYTES, psutil.virtual_memory().available // 4)
    if size > limit:
        raise InputError(
            f"{path}: {info.frames} frames of {info.width}x{info.height} would take {size / 2**30:.1f} GiB of memory "
            f"(limit {limit / 2**30:.1f} GiB); cut the clip or make it smaller"
        )
    # decord2 3.4 pads rows of frames narrower than 64 pixels and returns the padding as pixels: wrong colours, no
    # error. On some processors it also refuses a width of 72.
    frames, fps = _decode_narrow(path) if info.width < 96 else _decode(path)
    if len(frames) < info.frames:
        raise InputError(
            f"{path}: only {len(frames)} of {info.frames} frames can be read; the file is cut off, write it again"
        )
    if not np.isfinite(fps) or fps <= 0:
        raise InputError(f"{path}: states no frame rate; write it again with one")
    return Media(frames=np.ascontiguousarray(_undo_view(frames, info.comment))[None], fps=fps)


def _decode(path: Path) -> tuple[np.ndarray, float]:
    """(uint8 [F, H, W, 3], fps) by decord."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)  # or ffmpeg writes to stderr, beside our own error
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        return reader.get_batch(range(len(reader))).asnumpy(), float(reader.get_avg_fps())
    except (decord.DECORDError, RuntimeError, IndexError, ValueError):  # whose text is a C++ stack trace
        raise InputError(f"{path}: {_UNDECODABLE}") from None


def _decode_narrow(path: Path) -> tuple[np.ndarray, float]:
    """The same by PyAV, for narrow frames."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}  # raise on broken data instead of concealing it
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            return np.stack(frames), float(stream.average_rate or 0)
    except (av.FFmpegError, ValueError):
        raise InputError(f"{path}: {_UNDECODABLE}") from None


@dataclass(frozen=True)
class _VideoInfo:
    frames: int
    height: int
    width: int
    comment: str


def _probe_video(path: Path) -> _VideoInfo:
    """Walks the packets without decoding them: catches files on which a decoder would crash or guess. Raises
    `InputError`."""
    import av

    _refuse_cut_mp4(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: holds no video stream; give a video file")
            stream = container.streams.video[0]
            size = path.stat().st_size
            packets = 0
            for packet in container.demux(stream):
                if packet.size and packet.pos is not None and packet.pos + packet.size > size:
                    raise InputError(f"{path}: is cut off in the middle; write it again")
                packets += bool(packet.size) and not packet.is_corrupt
            if packets == 0:
                raise InputError(f"{path}: holds no frames; write it again")
            if stream.frames and packets < stream.frames:
                raise InputError(
                    f"{path}: only {packets} of {stream.frames} frames are there; the file is cut off, write it again"
                )
            context = stream.codec_context
            return _VideoInfo(
                max(packets, stream.frames), context.height, context.width, container.metadata.get("comment", "")
            )
    except PermissionError as error:
        raise InputError(f"cannot read {describe_os_error(error, path)}") from None
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"{path}: is not a readable video ({error.strerror or one_line(error, 120)}); it is corrupt or "
            "cut off, write it again"
        ) from None


def _refuse_cut_mp4(path: Path) -> None:
    """An mp4 is a sequence of boxes that begin with their length: one that ends beyond the file means a cut file."""
    if path.suffix.lower() not in (".mp4", ".m4v", ".mov"):
        return
    size, position = path.stat().st_size, 0
    with open(path, "rb") as file:
        while position + 8 <= size:
            file.seek(position)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length == 0 or not head[4:8].isascii():
                return  # extends to the end of the file by definition, or not an mp4 at all: the decoder will tell
            if position + length > size:
                raise InputError(f"{path}: is not a complete video (cut off at {size} bytes); write it again")
            if length < 8:
                return
            position += length


def _undo_view(frames: np.ndarray, comment: str) -> np.ndarray:
    """Averages the block that `encode_mp4` made of each pixel. [F, H*s, W*s, 3] -> [F, H, W, 3]."""
    if not comment.startswith(_TAG):
        return frames
    try:
        view = json.loads(comment[len(_TAG) :])
        scale, height, width = int(view["scale"]), int(view["height"]), int(view["width"])
    except (ValueError, KeyError, TypeError):
        return frames  # a comment by another program
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
