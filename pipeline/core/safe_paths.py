"""Paths whose names come from outside: prompts files, tables, manifests, listings of a store, clients.

Such a name is joined to a folder that the user has named and must stay in it: no absolute path elsewhere, no `..`, no
link that leads out. Only regular files are read: a FIFO can block its reader without end, and a device may never end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from pipeline.core.errors import InputError
from pipeline.core.files import describe_os_error

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link to nothing",
}


def relative_name(name: object, where: str, fix: str) -> PurePosixPath:
    """A relative name that stays below any folder it is joined to, judged by its text alone. Raises `InputError`.

    `where`: the file and key that hold the name, for the message; `fix`: what the user can do.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or any(part in ("", ".", "..") for part in parts) or "\x00" in str(name):
        raise InputError(f"{where}: found {name!r:.120}; only relative names without '..' are allowed; {fix}")
    return PurePosixPath(*parts)


def path_inside(root: Path, name: object, where: str, fix: str) -> Path:
    """`name` below `root`, links resolved; it need not exist. An absolute name inside `root` is allowed.

    Raises `InputError`.
    """
    if not isinstance(name, str) or not name or "\x00" in name:
        raise InputError(f"{where} must be a path, found {name!r:.80}; {fix}")
    home = Path(os.path.realpath(root))
    path = Path(os.path.realpath(home / name))
    if not path.is_relative_to(home) or path == home:
        raise InputError(f"{where} {name!r:.120} leads out of {home}; only files in that folder are allowed; {fix}")
    return Path(os.path.abspath(root)) / path.relative_to(home)  # the root as given: other nodes may know that path


def file_inside(root: Path, name: object, where: str, fix: str) -> Path:
    """As `path_inside`, for a regular file that exists. Raises `InputError`."""
    path = path_inside(root, name, where, fix)
    problem = not_regular(path)
    if problem is not None:
        raise InputError(f"{where} {name!r:.120} {problem} (looked for {path}); {fix}")
    return path


def not_regular(path: Path) -> str | None:
    """'is not there', 'is a FIFO, not a regular file' …; None for a regular file or a link to one. Opens nothing."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "is not there"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error.strerror if isinstance(error, OSError) else error})"
    return None if stat.S_ISREG(mode) else f"is {_KINDS.get(stat.S_IFMT(mode), 'special')}, not a regular file"


def check_regular(path: Path) -> None:
    """Raises `InputError` for a FIFO, device, socket or folder. A missing file passes: opening it raises the right
    error."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot read {describe_os_error(error, path)}") from None
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{path}: is {_KINDS.get(stat.S_IFMT(mode), 'special')}, not a regular file; put a regular file there"
        )
