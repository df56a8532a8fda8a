"""Which kind of picture or video a file is, by its first bytes. Kinds that are not listed here reach no decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.core.files import describe_os_error
from pipeline.core.safe_paths import check_regular

IMAGE_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
_HEAD = 400  # bytes that tell the kinds apart
_READABLE = "PNG, JPEG, WebP, BMP and GIF pictures, mp4, mov, webm, mkv and avi videos"


@dataclass(frozen=True)
class MediaKind:
    """`decoder`: the only format that PIL, or the only demuxer that FFmpeg, may try on the file."""

    name: str
    decoder: str
    video: bool = False


_PNG, _JPEG, _BMP, _GIF, _WEBP = (MediaKind(name, name.upper()) for name in ("PNG", "JPEG", "BMP", "GIF", "WebP"))
_MP4, _MATROSKA, _AVI = MediaKind("mp4", "mov", True), MediaKind("mkv", "matroska", True), MediaKind("avi", "avi", True)
_STARTS = {
    b"\x89PNG\r\n\x1a\n": _PNG,
    b"\xff\xd8\xff": _JPEG,
    b"BM": _BMP,
    b"GIF8": _GIF,
    b"\x1aE\xdf\xa3": _MATROSKA,
}
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_STILL_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1", b"avif", b"avis", b"crx ")
_REFUSED = {  # first bytes of what is often met under another name
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "PDF",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"\x00\x00\x01\xba": "an MPEG programme stream",
    b"FLV\x01": "Flash video",
    b"OggS": "Ogg",
    b"8BPS": "Photoshop",
}


def media_kind(path: Path) -> MediaKind:
    """Raises `InputError` for a file that is missing, no regular file, empty, or of no kind that is read."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise InputError(f"cannot read {describe_os_error(error, path)}") from None
    if not head:
        raise InputError(f"{path}: is empty (0 bytes); write it again")
    kind = _kind_of(head)
    if isinstance(kind, MediaKind):
        return kind
    if kind is not None:
        raise InputError(f"{path}: is {kind}, whatever its name; only {_READABLE} are read; convert it")
    suffix = path.suffix.lower()
    word = "picture" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else "picture or video"
    raise InputError(f"{path}: is not a {word}, or is corrupt; only {_READABLE} are read; write it again")


def is_media(data: bytes) -> bool:
    """Whether a file's bytes begin like a picture or clip of a kind that is read."""
    return isinstance(_kind_of(data[:_HEAD]), MediaKind)


def _kind_of(head: bytes) -> MediaKind | str | None:
    """The kind; the name of a kind that is refused; or None."""
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"AVI "):
        return _WEBP if head[8:12] == b"WEBP" else _AVI
    if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
        return "an HEIF or AVIF picture"
    if head[4:8] in _MP4_BOXES:
        return _MP4
    if head[:1] == head[188:189] == b"G":  # the sync byte of its packets
        return "an MPEG transport stream"
    return next((name for start, name in _REFUSED.items() if head.startswith(start)), None)
