"""What Ctrl-C, SIGTERM and SIGHUP do to a run: the first asks for a checkpoint and the end, the second ends it."""

from __future__ import annotations

import os
import signal
import stat
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import RunInterrupted

if TYPE_CHECKING:
    from jobs.cluster.ray_session import RaySession


NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """First SIGINT, SIGTERM or SIGHUP: `stop_requested` becomes True. Second: the process ends with exit code 130."""

    def __init__(self) -> None:
        self.stop_requested = False
        self.session: RaySession | None = None

    def __enter__(self) -> StopSignals:
        handlers = {number: signal.getsignal(number) for number in NUMBERS}
        if handlers[signal.SIGHUP] is signal.SIG_IGN:  # nohup: the run outlives its terminal
            del handlers[signal.SIGHUP]
        self._old = handlers
        self.install()
        return self

    def install(self) -> None:
        for number in self._old:
            signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `RunInterrupted` once asked to stop; for waits in which there is nothing to save."""
        if self.stop_requested:
            raise RunInterrupted("stopped while it was starting; nothing was begun")

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            _forget_terminal()
        if self.stop_requested:
            if self.session is not None:
                self.session.kill()
            os.write(1, b"\x1b[?25h\n" if os.isatty(1) else b"")  # show the cursor, which the live view hides
            os._exit(RunInterrupted.exit_code)
        self.stop_requested = True


def _forget_terminal() -> None:
    """The terminal is gone: what is still said must not fail."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(nothing, descriptor)
    os.close(nothing)
