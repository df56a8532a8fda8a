"""From the body of a score request to takes, in steps whose memory is known before it is taken."""

from __future__ import annotations

import base64
import binascii
import io
import struct
from pathlib import Path

import numpy as np

from pipeline.core.errors import InputError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards import routing
from pipeline.rewards.batching import Takes
from pipeline.rewards.models.protocol import (
    MAX_PIXEL_BYTES,
    Item,
    ScoreRequest,
    decode_image,
    decode_item,
    too_many_pixels,
)

BYTES_PER_MARK = 512  # memory per value of a parsed body, and per complaint about one, at most
DECODE_COPIES = 2  # a frame exists twice while a request's frames are put together, and while calls are joined
PNG_COPIES = 3  # of the one that is being decoded: 4 bytes a pixel in PIL, and the pieces of its bytes
_PNG_HEADER = 33  # bytes: signature and IHDR


def parsing_size(body: bytes) -> int:
    """Bytes that parsing takes, at most: each value of JSON comes with one of these marks, and every text is copied."""
    return 2 * len(body) + BYTES_PER_MARK * sum(body.count(mark) for mark in (b",", b":", b"[", b"{"))


def decoding_size(request: ScoreRequest) -> int:
    """Bytes that decoding takes, as the headers of the pictures say; nothing is decoded. What cannot be read counts 0:
    decoding refuses it. Raises `InputError` when the pictures are larger than `MAX_PIXEL_BYTES`."""
    total = largest = 0
    for item in request.items:
        if item.video is not None:
            total += _video_size(item.video)
        elif item.tensor is not None:
            total += len(item.tensor) * 3 // 4
        for text in (*(item.frames or ()), item.image or ""):
            size = _png_size(text)
            total, largest = total + size, max(largest, size)
        if total > MAX_PIXEL_BYTES:
            raise InputError(f"items: {too_many_pixels(total)}")
    return DECODE_COPIES * total + PNG_COPIES * largest


def _png_size(text: str) -> int:
    try:
        header = base64.b64decode(text[:44], validate=True)
    except (binascii.Error, ValueError):
        return 0
    if len(header) < _PNG_HEADER:
        return 0
    width, height = struct.unpack(">II", header[16:24])
    return width * height * 3


def _video_size(text: str) -> int:
    import av

    try:
        with av.open(io.BytesIO(base64.b64decode(text, validate=True)), "r", format="mp4") as container:
            stream = container.streams.video[0]
            packets = len([packet for packet in container.demux(stream) if packet.size])
            context = stream.codec_context
            if context is None:  # no known codec: decoding will say so
                return 0
            return max(packets, stream.frames) * context.height * context.width * 3
    except (av.FFmpegError, ValueError, IndexError, OSError):
        return 0


def decode_takes(request: ScoreRequest, folder: Path) -> tuple[list[Takes], list[list[int]]]:
    """(groups, the items that each holds). Takes of one size, length and rate form a group; a prompt's index tells
    takes of the same prompt, as a tournament needs. `folder`: for the prompts' own pictures. Raises `InputError`."""
    items = request.items
    texts = list(dict.fromkeys(item.prompt for item in items))
    media: list[Media | None] = []
    images: list[str | None] = []
    buckets: dict[tuple, list[int]] = {}
    decoded = 0
    for number, item in enumerate(items):
        one = decode_item(item, number)
        image, size = decode_image(item, number, folder)
        decoded += one.frames.nbytes + size
        if decoded > MAX_PIXEL_BYTES:
            raise InputError(f"items: {too_many_pixels(decoded)}")
        media.append(one)
        images.append(image)
        buckets.setdefault((one.frames.shape[1:], one.fps), []).append(number)
    groups = []
    for (_, fps), numbers in buckets.items():
        parts = [kept.frames for n in numbers if (kept := media[n]) is not None]
        for n in numbers:
            media[n] = None  # its memory is needed for the next group
        prompts = [_prompt(items[n], texts, images[n]) for n in numbers]
        frames = parts[0] if len(parts) == 1 else np.concatenate(parts)
        groups.append(Takes(Media(frames=frames, fps=fps), prompts, None))
    return groups, list(buckets.values())


def _prompt(item: Item, texts: list[str], image: str | None) -> PromptItem:
    metadata = {key: value for key, value in item.metadata.items() if key != routing.KEY}  # the client's own business
    return PromptItem(index=texts.index(item.prompt), text=item.prompt, image=image, metadata=metadata)
