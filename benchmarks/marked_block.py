"""The part of a page that is made from results: the text between two markers."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.core.files import atomic_write


def renew(page: Path, begin: str, end: str, made: str) -> None:
    """Replaces what stands between the markers. Raises InputError where they are missing."""
    text = page.read_text("utf-8")
    if begin not in text or end not in text:
        raise InputError(f"{page}: the markers {begin!r} and {end!r} are missing")
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    atomic_write(page, f"{head}{begin}\n{made}\n{end}{tail}".encode())
