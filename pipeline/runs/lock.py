"""One process at a time writes a run: a lock on its folder, which the system frees when the process dies.

Readers ask the system who holds the lock and never take it themselves, so that looking at a run disturbs no writer.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
from pathlib import Path
from typing import IO

import psutil

from pipeline.core.errors import RushesError
from pipeline.core.files import describe_os_error
from pipeline.runs.paths import RunDir

_FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length, pid
_HOLDER = re.compile(r"process (\d{1,10}) on (\S{1,255})")
UNKNOWN = "another process"


def this_process() -> str:
    """`process N on HOST`: how the writer of a run is named to others."""
    return f"process {os.getpid()} on {os.uname().nodename}"


class RunLock:
    """`with RunLock(run):` holds the run's lock. The file names its holder."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._handle: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Raises `RushesError` naming the process that holds the lock."""
        try:
            handle = open(self.run.lock, "a+", errors="replace")  # noqa: SIM115 (closing it would free the lock)
        except OSError as error:
            raise RushesError(f"cannot lock the run: {describe_os_error(error, self.run.lock)}") from error
        try:
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except OSError:
            holder = _holder(handle)
            handle.close()
            raise RushesError(
                f"run {self.run.name} is being written by {holder}; wait for it, stop it, or use another run.name"
            ) from None
        handle.truncate(0)
        handle.write(this_process())
        handle.flush()
        self._handle = handle
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def writer_of(run: RunDir) -> str | None:
    """`process N on HOST` while a process writes the run, else None. The name is what the file says: `writing_process`
    checks it."""
    try:
        with open(run.lock, errors="replace") as handle:
            asked = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
            held = struct.unpack(_FLOCK, fcntl.fcntl(handle, fcntl.F_OFD_GETLK, asked))[0]
            return None if held == fcntl.F_UNLCK else _holder(handle)
    except OSError:
        return None


def _holder(handle: IO[str]) -> str:
    handle.seek(0)
    text = handle.read(300).strip()
    return text if _HOLDER.fullmatch(text) else UNKNOWN


def writing_process(run: RunDir) -> psutil.Process | None:
    """The process of this machine that has the run's lock open: the one that the lock file names, if that is true.
    None if nobody writes the run, or the writer cannot be told: the file of a shared or copied run may name any pid."""
    match = _HOLDER.fullmatch(writer_of(run) or "")
    if match is None or match.group(2) != os.uname().nodename:
        return None
    try:
        process = psutil.Process(int(match.group(1)))
        lock = run.lock.stat()
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                opened = descriptor.stat()
            except OSError:  # closed meanwhile
                continue
            if (opened.st_dev, opened.st_ino) == (lock.st_dev, lock.st_ino):
                return process
    except (psutil.Error, OSError):  # gone, or another user's
        return None
    return None
