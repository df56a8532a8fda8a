"""The reward protocol (version 1) as types: what `rushes serve-reward` reads and answers, and the `http` scorer sends.

Each item is one take, in one of three forms: `frames`, a list of PNGs (lossless); `video`, an mp4 (small, lossy);
`tensor`, a safetensors file with `frames` uint8 [F, H, W, 3] (lossless, quick). All of them in base64; never pickle.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.core.errors import InputError, one_line
from pipeline.core.types import Media
from pipeline.rewards.models.web import png_base64

ENCODINGS = ("png", "mp4", "safetensors")
MAX_ITEMS = 1024
MAX_PIXEL_BYTES = 2 * 2**30  # of a request, decoded: a small file may hold a very large picture


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Item(_Message):
    """One take: exactly one of `frames`, `video` and `tensor`."""

    prompt: str = Field(max_length=20_000, description="The take's prompt.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="The prompt's further columns, for the scorer.")
    fps: float = Field(default=1.0, gt=0, description="Frames per second.")
    frames: list[str] | None = Field(default=None, min_length=1, description="PNG files in base64, in order.")
    video: str | None = Field(default=None, description="An mp4 file in base64.")
    tensor: str | None = Field(default=None, description="A safetensors file in base64: frames uint8 [F, H, W, 3].")
    image: str | None = Field(
        default=None, description="The prompt's own picture, a PNG in base64: the source of an edit, or a reference."
    )

    @model_validator(mode="after")
    def _one_form(self) -> Item:
        given = [name for name in ("frames", "video", "tensor") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'no picture'}; give one of frames, video and tensor")
        return self


class ScoreRequest(_Message):
    """POST /score"""

    version: Literal[1] = Field(description="Of the protocol.")
    items: list[Item] = Field(min_length=1, max_length=MAX_ITEMS)


class ScoreAnswer(_Message):
    """One number an item, in order; in `parts` null means that it does not apply."""

    scores: list[float]
    parts: dict[str, list[float | None]] = Field(default_factory=dict)


def schema() -> dict[str, Any]:
    """JSON schemas of the request and the answer."""
    return {"request": ScoreRequest.model_json_schema(), "answer": ScoreAnswer.model_json_schema()}


def parse_request(body: bytes) -> ScoreRequest:
    """Raises `InputError`, one line that says where."""
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        first = problems[0]
        where = ".".join(str(step) for step in first["loc"]) or "the body"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{where}: {first['msg'].removeprefix('Value error, ')}{more}; see /schema") from None


# --------------------------------------------------------------------------------------------- pictures in and out


def encode_frames(frames: np.ndarray, fps: float, encoding: str) -> dict[str, Any]:
    """uint8 [F, H, W, 3] as the part of an `Item` that holds the pictures."""
    if encoding == "png":
        return {"frames": [png_base64(frame) for frame in frames]}
    if encoding == "mp4":
        from pipeline.core.media import encode_mp4

        return {"video": base64.b64encode(encode_mp4(frames, fps, scale=1)).decode("ascii")}
    from safetensors.numpy import save

    return {"tensor": base64.b64encode(save({"frames": np.ascontiguousarray(frames)})).decode("ascii")}


def decode_item(item: Item, number: int) -> Media:
    """Media with K = 1. Raises `InputError` naming the item and what is wrong with it."""
    try:
        if item.video is not None:
            return _decode_mp4(_bytes(item.video))
        if item.tensor is not None:
            return Media(frames=_decode_tensor(_bytes(item.tensor))[None], fps=item.fps)
        assert item.frames is not None
        pictures = [_decode_png(_bytes(text)) for text in item.frames]
        sizes = {picture.shape for picture in pictures}
        if len(sizes) > 1:
            raise InputError(f"its frames have {len(sizes)} different sizes; give frames of one size")
        if sum(picture.nbytes for picture in pictures) > MAX_PIXEL_BYTES:
            raise InputError(too_many_pixels(sum(picture.nbytes for picture in pictures)))
        return Media(frames=np.stack(pictures)[None], fps=item.fps)
    except InputError as error:
        raise InputError(f"items.{number}: {error}") from None


def decode_image(item: Item, number: int, folder: Path) -> tuple[str | None, int]:
    """(the item's `image` as a file in `folder`, its bytes decoded); None, 0 without one. Raises `InputError`."""
    if item.image is None:
        return None, 0
    try:
        data = _bytes(item.image)
        size = _decode_png(data).nbytes
    except InputError as error:
        raise InputError(f"items.{number}: image: {error}") from None
    file = folder / f"{hashlib.sha256(data).hexdigest()}.png"
    file.write_bytes(data)
    return str(file), size


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError("not base64") from None


def _decode_png(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]. PNG only: each further decoder is a further attack surface."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            if width * height * 3 > MAX_PIXEL_BYTES:
                raise InputError(too_many_pixels(width * height * 3))
            if image.mode != "RGB":
                raise InputError(f"found a {image.mode} PNG; send RGB, 8 bits a channel")
            return np.asarray(image, dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"a frame is no readable PNG ({one_line(error, 80)})") from None


def _decode_mp4(data: bytes) -> Media:
    from pipeline.core.media import read_media

    with tempfile.TemporaryDirectory(prefix="rushes-") as folder:
        path = Path(folder) / "clip.mp4"
        path.write_bytes(data)
        try:
            return read_media(path)
        except InputError as error:
            raise InputError(str(error).replace(str(path), "video")) from None


def _decode_tensor(data: bytes) -> np.ndarray:
    """uint8 [F, H, W, 3]."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"tensor: not a safetensors file ({str(error)[:80]})") from None
    frames = tensors.get("frames")
    if frames is None or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        got = "no 'frames'" if frames is None else f"frames {frames.dtype} {list(frames.shape)}"
        raise InputError(f"tensor: found {got}; expected 'frames' uint8 [F, H, W, 3]")
    return frames


def too_many_pixels(size: int) -> str:
    """Text of the `InputError`."""
    return f"it would take {size / 2**30:.1f} GiB decoded (limit {MAX_PIXEL_BYTES / 2**30:.0f} GiB); send less"
