"""The log of a run: every process of it appends to run.log, and no secret does."""

from __future__ import annotations

import logging
import os
import re

from pipeline.runs.paths import RunDir

_HANDLER = "rushes run.log"
_SECRET_NAME = re.compile(r"(token|secret|password|passwd|api_?key|credential)", re.IGNORECASE)


class _Formatter(logging.Formatter):
    """Fills in the group where none is given, and masks the values of environment variables with secret-looking names,
    also in tracebacks."""

    def __init__(self, fmt: str) -> None:
        super().__init__(fmt, defaults={"group": "-"})
        self.secrets = [v for k, v in os.environ.items() if _SECRET_NAME.search(k) and len(v) >= 8]

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


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
