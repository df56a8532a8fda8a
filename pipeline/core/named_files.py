"""The pictures and clips that rows of a prompts file or table name: `image`, and in `metadata` `condition`,
`reference` (a path or a list) and `conditions` (argument of the generator -> file).

They must lie in the folder of the file that names them, or below it: a prompts file by somebody else must not make this
machine read other files and send them to the program that computes a reward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import InputError, RushesError
from pipeline.core.files import atomic_write
from pipeline.core.safe_paths import file_inside, path_inside

FILE_KEYS = ("condition", "reference")  # in metadata, read by scorers
SUFFIXES = tuple(f".{kind}" for kind in "png jpg jpeg webp bmp gif tif tiff mp4 m4v mov webm mkv avi".split())
# Offset, the bytes there, and the suffix of such a file.
_PICTURES = ((0, b"\x89PNG", ".png"), (0, b"\xff\xd8\xff", ".jpg"), (8, b"WEBP", ".webp"), (0, b"BM", ".bmp"))
_CLIPS = ((4, b"ftyp", ".mp4"), (0, b"\x1aE\xdf\xa3", ".mkv"))
FIX = "paths are relative to the prompts file or table: put that into a folder above, or copy the picture beside it"


def named_file(folder: Path, name: Any, where: str) -> Path:
    """The file `name` of a row whose table lies in `folder`. Raises `InputError`."""
    return file_inside(folder, name, where, FIX)


def picture_file(table: Path, image: Any, where: str) -> Path:
    """The picture of a row's column `image`: the file that it names, or the bytes of an image of the `datasets`
    library ({bytes, path}), which are kept as a file beside the table, where all nodes find it. Raises `InputError`."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(image, dict) and data is None:
        return named_file(table.parent, image.get("path"), where)
    if not isinstance(data, bytes):
        return named_file(table.parent, image, where)
    suffix = _suffix_of(data, _PICTURES)
    if suffix is None:
        raise InputError(f"{where} holds {len(data):,} bytes that are no PNG, JPEG, WEBP or BMP; encode it again")
    return _kept(table, data, suffix, where)


def take_file(table: Path, take: str | bytes, where: str) -> Path:
    """The picture or clip of a row that compares takes, in the table's folder: the file that it names, which need not
    be there, or its bytes, which are kept as a file beside the table. Raises `InputError`."""
    if isinstance(take, str):
        return path_inside(table.parent, take, where, FIX)
    return _kept(table, take, media_suffix(take), where)


def media_suffix(data: bytes) -> str:
    """Of a picture's or clip's bytes; `.unknown`."""
    return _suffix_of(data, _PICTURES + _CLIPS) or ".unknown"


def _suffix_of(data: bytes, kinds: Sequence[tuple[int, bytes, str]]) -> str | None:
    return next((suffix for at, magic, suffix in kinds if data[at : at + len(magic)] == magic), None)


def _kept(table: Path, data: bytes, suffix: str, where: str) -> Path:
    """The file beside the table that holds a row's bytes."""
    folder = table.with_name(f"{table.name}.images")
    file = folder / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
    if not file.exists():
        try:
            atomic_write(file, data)
        except RushesError as error:
            raise InputError(f"{where}: its picture is kept beside the table: {error}") from None
    return file


def named_files(
    metadata: dict[str, Any], folder: Path, where: str
) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """(metadata with the paths in `conditions` made absolute, the files behind `FILE_KEYS`). Raises `InputError`.

    Text without the suffix of a picture or clip is no path. A missing `condition` or `reference` is left to the scorer
    that reads it: a user's reward may mean something else by the key.
    """
    files = {}
    for key in FILE_KEYS:
        value = metadata.get(key)
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list) and names and all(_is_path(name) for name in names):
            paths = [path_inside(folder, name, f"{where}.{key}", FIX) for name in names]
            if all(path.exists() for path in paths):
                files[key] = tuple(str(named_file(folder, name, f"{where}.{key}")) for name in names)
    conditions = metadata.get("conditions")
    if isinstance(conditions, dict):
        absolute = {
            name: str(named_file(folder, value, f"{where}.conditions.{name}")) if _is_path(value) else value
            for name, value in conditions.items()
        }
        metadata = {**metadata, "conditions": absolute}
    return metadata, files


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value.lower().endswith(SUFFIXES)
