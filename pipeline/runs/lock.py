"""One process at a time writes a run: a lock on its folder, which the system frees when the process dies."""

from __future__ import annotations

import fcntl
import os
from typing import IO

from pipeline.core.errors import RushesError
from pipeline.core.files import describe_os_error
from pipeline.runs.paths import RunDir


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
            handle = open(self.run.lock, "a+")  # noqa: SIM115 (stays open: closing it would free the lock)
        except OSError as error:
            raise RushesError(f"cannot lock the run: {describe_os_error(error, self.run.lock)}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
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
    """`process N on HOST` while a process of this machine writes the run, else None."""
    try:
        with open(run.lock, errors="replace") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return handle.read().strip() or "another process"
    except OSError:
        pass
    return None
