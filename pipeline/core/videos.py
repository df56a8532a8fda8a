"""Which frames a video file has: decoded by FFmpeg (PyAV), and checked against what the file itself says.

Every frame that the container announces and its edit list shows must be decoded, once, whole, at a time of its own and
in one size; the frames are turned as the file's display matrix says. Anything else is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.errors import InputError, one_line
from pipeline.core.files import describe_os_error
from pipeline.core.media_kinds import MediaKind

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

_AGAIN = "it is corrupt or cut off, write it again"
_UNIT = 1 << 16  # 1.0 in a display matrix


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """The frames of a file as they are shown."""

    frames: np.ndarray  # uint8 [F, H, W, 3]
    fps: float
    comment: str  # of the file's metadata


@dataclass(frozen=True, slots=True)
class VideoHead:
    """What a file's container says of its frames, before they are turned upright."""

    frames: int
    height: int
    width: int
    fps: float  # 0: not stated
    comment: str  # of the file's metadata


def read_video(path: Path, kind: MediaKind, limit: int) -> VideoFrames:
    """Raises `InputError`, also when the frames would take more than `limit` bytes, before decoding them."""
    head = probe_video(path, kind)
    shown, height, width = head.frames, head.height, head.width
    size = shown * height * width * 3
    if size > limit:
        raise InputError(
            f"{path}: {shown} frames of {width}x{height} would take {size / 2**30:.1f} GiB of memory "
            f"(limit {limit / 2**30:.1f} GiB); cut the clip or make it smaller"
        )
    frames, fps = _decode(path, kind, shown)
    if not np.isfinite(fps) or fps <= 0:
        raise InputError(f"{path}: states no frame rate; write it again with one")
    return VideoFrames(frames, fps, head.comment)


@contextmanager
def _opened(path: Path, kind: MediaKind, **options: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream. FFmpeg may use only the demuxer of the kind, and read only this file."""
    import av
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    options = {"protocol_whitelist": "file", **options}
    try:
        with av.open(f"file:{path}", format=kind.decoder, options=options) as container:
            streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
            if not streams:
                what = "video, only a cover picture" if container.streams.video else "video stream"
                raise InputError(f"{path}: holds no {what}; give a video file")
            if streams[0].codec_context is None:  # FFmpeg knows no decoder for what the damaged header names
                raise InputError(f"{path}: holds video of no known codec; {_AGAIN}")
            yield container, streams[0]
    except PermissionError as error:
        raise InputError(f"cannot read {describe_os_error(error, path)}") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error, 120)
        raise InputError(f"{path}: is not a readable video ({reason}); {_AGAIN}") from None


def probe_video(path: Path, kind: MediaKind) -> VideoHead:
    """The frames that are shown, from the packets without decoding them. Raises `InputError`."""
    _refuse_cut(path, kind)
    size = path.stat().st_size
    with _opened(path, kind) as (container, stream):
        packets, shown = 0, 0
        for packet in container.demux(stream):
            if packet.size and packet.pos is not None and packet.pos + packet.size > size:
                raise InputError(f"{path}: is cut off in the middle; write it again")
            if packet.is_corrupt:
                raise InputError(f"{path}: frame {packets} is damaged; {_AGAIN}")
            packets += bool(packet.size)
            shown += bool(packet.size) and not packet.is_discard  # an edit list hides the others
        announced = stream.frames
        context = stream.codec_context
        comment = container.metadata.get("comment", "")
        head = VideoHead(shown, context.height, context.width, float(stream.average_rate or 0), comment)
    if announced > packets and kind.decoder == "mov":  # an edit list may also have left out the end
        with _opened(path, kind, ignore_editlist="1") as (container, stream):
            packets = sum(bool(packet.size) for packet in container.demux(stream))
    if shown == 0:
        raise InputError(f"{path}: holds no frames; write it again")
    if packets < announced:
        raise InputError(f"{path}: only {packets} of {announced} frames are there; the file is cut off, write it again")
    return head


def _decode(path: Path, kind: MediaKind, shown: int) -> tuple[np.ndarray, float]:
    """(uint8 [F, H, W, 3], frames per second); F is `shown`."""
    from av.video.reformatter import VideoReformatter

    frames: np.ndarray | None = None
    times: list[float] = []
    turn: tuple[int, ...] | None = None
    reformatter = VideoReformatter()
    with _opened(path, kind) as (container, stream):
        stream.codec_context.options = {"err_detect": "explode"}  # raise on broken data instead of concealing it
        stream.codec_context.thread_count = 1
        count = 0
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise InputError(f"{path}: frame {count} is damaged; {_AGAIN}")
            if frames is None:
                frames = np.empty((shown, frame.height, frame.width, 3), np.uint8)
                turn = _display_turn(frame, path)
            if (frame.height, frame.width) != frames.shape[1:3] or _display_turn(frame, path) != turn:
                raise InputError(
                    f"{path}: frame {count} is {frame.width}x{frame.height} and the first is "
                    f"{frames.shape[2]}x{frames.shape[1]}; a clip has one size, write it again"
                )
            if count < shown:
                frames[count] = reformatter.reformat(frame, format="rgb24").to_ndarray()
            if frame.pts is not None and frame.time_base:
                times.append(float(frame.pts * frame.time_base))
            count += 1
        stated = float(stream.average_rate or 0)
        duration = (container.duration or 0) / 1e6 if len(container.streams) == 1 and kind.decoder != "mov" else 0.0
    if frames is None or count != shown:
        raise InputError(f"{path}: only {min(count, shown)} of {max(count, shown)} frames can be read; {_AGAIN}")
    if any(later <= earlier for earlier, later in zip(times[:-1], times[1:], strict=True)):
        raise InputError(f"{path}: several frames are shown at the same time; {_AGAIN}")
    fps = _rate(times, shown, stated)
    if kind.decoder != "mov" and fps < 0.98 * stated:  # there no edit list can be the reason
        raise InputError(f"{path}: states {stated:g} frames per second and has {fps:.4g}: frames are missing; {_AGAIN}")
    if duration and times and fps and times[-1] + 1.5 / fps < duration:
        raise InputError(
            f"{path}: its frames end after {times[-1]:.2f} s, but it says that it lasts {duration:.2f} s; {_AGAIN}"
        )
    return _turned(frames, turn), fps


def _rate(times: list[float], shown: int, stated: float) -> float:
    """The stated rate, unless the frames' times say something else (an edit list, a broken header)."""
    if len(times) != shown or shown < 2:
        return stated
    measured = (shown - 1) / (times[-1] - times[0])
    return stated if abs(stated - measured) <= 0.02 * measured else measured


def _display_turn(frame: VideoFrame, path: Path) -> tuple[int, ...] | None:
    """(a, b, c, d) of the display matrix, each -1, 0 or 1; None where frames are shown as they are stored.

    The pixel in column x and row y is shown in column a x + c y and row b x + d y. Raises `InputError` for a matrix
    that does more than turn by right angles and mirror.
    """
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    matrix = np.frombuffer(bytes(data), np.int32)[[0, 1, 3, 4]] / _UNIT
    turn = tuple(int(value) for value in np.rint(matrix))
    right_angles = [(a, 0, 0, d) for a in (-1, 1) for d in (-1, 1)] + [(0, b, c, 0) for b in (-1, 1) for c in (-1, 1)]
    if turn not in right_angles or np.abs(matrix - turn).max() > 0.001:
        raise InputError(f"{path}: is to be shown turned by other than a right angle; write its frames upright")
    if turn == (1, 0, 0, 1):
        return None
    return turn


def _turned(frames: np.ndarray, turn: tuple[int, ...] | None) -> np.ndarray:
    """[F, H, W, 3] as they are shown."""
    if turn is None:
        return frames
    a, b, c, d = turn
    if a == 0:
        frames = frames.transpose(0, 2, 1, 3)
    return frames[:, :: (b or d), :: (a or c)]


def _refuse_cut(path: Path, kind: MediaKind) -> None:
    """Raises `InputError` for a file that ends inside one of the parts whose length it states."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        end = {"mov": _end_of_mp4, "matroska": _end_of_matroska, "avi": _end_of_riff}[kind.decoder](file, size)
    if end > size:
        raise InputError(f"{path}: is not a complete video (cut off at {size} bytes); write it again")


def _end_of_mp4(file: Any, size: int) -> int:
    """Where the last box ends."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8 or not head[4:8].isascii():  # 0: to the end of the file; others: the decoder will tell
            return size
        position += length
    return position


def _end_of_riff(file: Any, size: int) -> int:
    """Where the first RIFF chunk ends; a long AVI has more."""
    return int.from_bytes(file.read(8)[4:], "little") + 8


def _end_of_matroska(file: Any, size: int) -> int:
    """Where the last element ends. Segments and clusters of unknown length are searched for those inside."""
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(12)
        start, identifier = _vint(head, keep_marker=True)
        if identifier is None:
            return size  # not an element: the decoder will tell
        after, length = _vint(head[start:], keep_marker=False)
        if length is None:
            return size + 1  # cut off within the head of an element
        position += start + after
        unknown = length == (1 << 7 * after) - 1
        if not unknown and position + length > size:
            return position + length
        if identifier not in (0x18538067, 0x1F43B675) or (identifier == 0x1F43B675 and not unknown):
            position += 0 if unknown else length
    return position


def _vint(data: bytes, keep_marker: bool) -> tuple[int, int | None]:
    """(bytes used, number) of EBML's variable-length number; the number is None where there is none."""
    width = 9 - data[0].bit_length() if data and data[0] else 0
    if not 1 <= width <= len(data):
        return 0, None
    number = int.from_bytes(data[:width], "big")
    return width, number if keep_marker else number & ~(1 << 7 * width)
