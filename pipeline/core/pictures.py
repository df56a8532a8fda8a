"""Reads pictures, and animations in picture formats (GIF, APNG, animated WebP), with PIL.

PIL may try only the format that the file's first bytes show: others of its formats start programs (Ghostscript) or hold
several pictures.
"""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.errors import InputError, one_line
from pipeline.core.media_kinds import MediaKind, media_kind

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage


def open_picture(path: Path) -> PilImage:
    """A still picture, decoded, turned upright as its EXIF data says; 16 bits of grey become 8.

    Raises `InputError`, also for an animation.
    """
    path = Path(path)
    kind = media_kind(path)
    if kind.video:
        raise InputError(f"{path}: is a video ({kind.name}); give a picture")
    from PIL import ImageOps

    with _opened(path, kind) as image:
        if (count := getattr(image, "n_frames", 1)) > 1:
            raise InputError(f"{path}: is an animation of {count} frames; give a picture")
        return _eight_bits(ImageOps.exif_transpose(image))


def read_frames(path: Path, kind: MediaKind, animation_limit: Callable[[], int]) -> tuple[np.ndarray, float]:
    """(uint8 [F, H, W, 3], frames per second); 1.0 for a still picture. An animation's rate is that of all its frames
    on average.

    `animation_limit`: bytes that the frames of an animation may take. Raises `InputError`.
    """
    from PIL import ImageOps

    with _opened(path, kind) as image:
        count = getattr(image, "n_frames", 1)
        if count == 1:
            return as_rgb(ImageOps.exif_transpose(image))[None], 1.0
        size, limit = count * image.width * image.height * 3, animation_limit()
        if size > limit:
            raise InputError(
                f"{path}: {count} frames of {image.width}x{image.height} would take {size / 2**30:.1f} GiB of memory "
                f"(limit {limit / 2**30:.1f} GiB); cut the clip or make it smaller"
            )
        frames, milliseconds = np.empty((count, image.height, image.width, 3), np.uint8), 0.0
        for number in range(count):
            image.seek(number)
            image.load()
            frames[number] = as_rgb(image)
            milliseconds += image.info.get("duration", 0)
        if milliseconds <= 0:
            raise InputError(f"{path}: its {count} frames state no duration; write it again with a frame rate")
        return frames, 1000.0 * count / milliseconds


def picture_size(path: Path, kind: MediaKind) -> tuple[int, int, int]:
    """(frames, height, width) as stored, from the file's head. Raises `InputError`."""
    with _opened(path, kind) as image:
        return getattr(image, "n_frames", 1), image.height, image.width


@contextlib.contextmanager
def _opened(path: Path, kind: MediaKind) -> Iterator[PilImage]:
    """The file opened by PIL; what goes wrong with it in the block becomes an `InputError`."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            data = path.read_bytes()
            _refuse_damaged(path, kind, data)
            with Image.open(io.BytesIO(data), formats=[kind.decoder]) as image:
                yield image
    except InputError:
        raise
    except Image.UnidentifiedImageError:
        raise InputError(f"{path}: is not a picture, or is corrupt; write it again") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({one_line(error, 120)}); write it again") from None


def _refuse_damaged(path: Path, kind: MediaKind, data: bytes) -> None:
    """What PIL does not look at: a PNG's checksums, and the length of an animation, of which it reads what is left."""
    if kind.name == "WebP":
        whole = int.from_bytes(data[4:8], "little") + 8 <= len(data)
    elif kind.name == "GIF":
        whole = data.rstrip(b"\0").endswith(b";")
    else:
        whole = kind.name != "PNG" or _png_is_whole(data)
    if not whole:
        raise InputError(f"{path}: is corrupt or cut off (at {len(data)} bytes); write it again")


def _png_is_whole(data: bytes) -> bool:
    """Whether all chunks up to IEND are there with the right checksums."""
    position, view = 8, memoryview(data)
    while position + 12 <= len(data):
        length = int.from_bytes(view[position : position + 4], "big")
        name, end = bytes(view[position + 4 : position + 8]), position + 8 + length
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big") or end + 4 > len(data):
            return False
        if name == b"IEND":
            return True
        position = end + 4
    return False


def as_rgb(image: PilImage) -> np.ndarray:
    """uint8 [H, W, 3] of a PIL picture; transparent parts become white, 16 bits of grey are scaled to 8."""
    from PIL import Image

    image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"), dtype=np.uint8)


def _eight_bits(image: PilImage) -> PilImage:
    """16 bits of grey scaled to 8, where PIL's own conversion clips; other pictures as they are."""
    from PIL import Image

    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(np.rint(np.asarray(image, dtype=np.float64) / 257.0).astype(np.uint8))
