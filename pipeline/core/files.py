"""Atomic file writes, one wording for the operating system's errors, and suggestions for mistyped names."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.core.errors import RushesError

MAX_SHOWN = 255  # characters of a path in a message
_FIXES = {
    errno.ENOSPC: "the disk is full; free some space or write to another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or write to another folder",
    errno.EACCES: "no permission; choose a folder you may write to or change its owner",
    errno.EPERM: "no permission; choose a folder you may write to or change its owner",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a file stands where a folder is needed; remove it or choose another path",
    errno.EEXIST: "a file stands where a folder is needed; remove it or choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
    errno.ENOENT: "no such file or folder; check the path",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
    errno.ENAMETOOLONG: "the name is too long; check the path",
}


def describe_os_error(error: OSError, path: str | os.PathLike | None = None) -> str:
    """One line naming the path, what went wrong and what to do."""
    where = path if path is not None else error.filename
    if where is not None and len(os.fsdecode(where)) > MAX_SHOWN:
        where = f"{os.fsdecode(where)[:MAX_SHOWN]}…"
    fix = _FIXES.get(error.errno or 0, error.strerror or str(error))
    return f"{where}: {fix}" if where is not None else fix


def atomic_write(path: Path, data: bytes) -> None:
    """Writes `data` to `path` completely or not at all: to a temporary neighbour, which then replaces the target.
    Raises `RushesError` naming the path and a fix."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RushesError(f"cannot write {describe_os_error(error, path)}") from error


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The most similar of the choices, or None when none is similar."""
    matches = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.55)
    return matches[0] if matches else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """'; did you mean X?' or ''."""
    match = nearest(word, choices)
    return f"; did you mean {match}?" if match else ""
