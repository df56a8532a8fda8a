"""The report of a running run, written anew whenever the run has recorded something; open pages renew themselves.

`report.js` beside the page holds the stamp of its latest version. It is written last, so that whoever reads a new stamp
finds the new page.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.core.files import atomic_write
from pipeline.runs.lock import writer_of
from pipeline.runs.paths import RunDir
from pipeline.tools.report.report import build_report

EVERY_S = 30.0  # between two looks at the run's records
STAMP_FILE = "report.js"


def follow(find_run: Callable[[], Path], written: Callable[[Path], None], every_s: float = EVERY_S) -> None:
    """Until the run has ended: writes the report when the run's records have changed. `find_run`: the run's folder,
    fetched anew where it is remote; `written` is told of every report. Raises `RushesError` when it is no run."""
    seen: list[tuple[int, int]] | None = None
    while True:
        run = RunDir(find_run())
        ended = bool(run.summary.exists()) and writer_of(run) is None
        records = _versions(run)
        if records != seen or ended:
            write_followed(run.path, ended)
            written(run.report)
            seen = records
        if ended:
            return
        time.sleep(every_s)


def write_followed(run_dir: Path, ended: bool) -> Path:
    """The report with a new stamp. The last one, after the run has `ended`, does not renew itself any more."""
    stamp = str(time.time_ns())
    report = build_report(run_dir, stamp=None if ended else stamp)
    atomic_write(report.parent / STAMP_FILE, f"window.rushesReport = {json.dumps(stamp)};\n".encode())
    return report


def _versions(run: RunDir) -> list[tuple[int, int]]:
    files = [file.stat() for file in (run.config, run.metrics, run.evals, run.summary) if file.exists()]
    return [(file.st_mtime_ns, file.st_size) for file in files]
