"""The log of a run: every process of it appends to run.log, and no secret does."""

from __future__ import annotations

import logging

from pipeline.core.secrets import mask
from pipeline.runs.paths import RunDir

_HANDLER = "rushes run.log"


class _Formatter(logging.Formatter):
    """Fills in the group where none is given, and masks secrets, also in tracebacks."""

    def __init__(self, fmt: str) -> None:
        super().__init__(fmt, defaults={"group": "-"})

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


def setup_logging(run: RunDir, role: str, worker: str = "-") -> None:
    """Sends this process's log to run.log. Every line names run, role, worker and, where known, the group
    (`log.info(..., extra={"group": 7})`). Several processes append to one file, a line at a time.
    Falls back to stderr when the file cannot be opened (a node without the shared folder)."""
    try:
        handler: logging.Handler = logging.FileHandler(run.log, mode="a", encoding="utf-8")
    except OSError:
        handler = logging.StreamHandler()
    origin = f"run={run.name} role={role} worker={worker} group=%(group)s"
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s {origin} %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.name == _HANDLER]:
        root.removeHandler(old)
        old.close()
    handler.name = _HANDLER
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("rushes").setLevel(logging.INFO)
    logging.captureWarnings(True)
