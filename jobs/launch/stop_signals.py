"""What Ctrl-C and SIGTERM do to a run: the first asks for a checkpoint and the end, the second ends it at once."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import RunInterrupted

if TYPE_CHECKING:
    from jobs.cluster.ray_session import RaySession


class StopSignals:
    """First SIGINT or SIGTERM: `stop_requested` becomes True. Second: the process ends at once with exit code 130."""

    def __init__(self) -> None:
        self.stop_requested = False
        self.session: RaySession | None = None

    def __enter__(self) -> StopSignals:
        self._old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        return self

    def install(self) -> None:
        for number in self._old:
            signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.stop_requested:
            if self.session is not None:
                self.session.kill()
            os.write(1, b"\x1b[?25h\n" if os.isatty(1) else b"")  # show the cursor, which the live view hides
            os._exit(RunInterrupted.exit_code)
        self.stop_requested = True
