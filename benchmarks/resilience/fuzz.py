"""Thousands of bad and odd inputs over everything that reads what others have written.

    make fuzz
    python -m benchmarks.resilience.fuzz [--seed 0] [--only AREA] [--report FILE]

Areas: config, command line, text (YAML, JSON, JSONL, parquet as prompts), media, checkpoints and LoRAs, run folders,
HTTP bodies (a real `serve-reward`), endpoint answers (a real scorer of a made-up server). The inputs are made from good
ones by `fuzz_inputs`; the areas are in `fuzz_areas`, `fuzz_files` and `fuzz_http`.

Each input must end, within its time, accepted or refused by one line of our own. A finding is an *internal error* (any
other exception, a traceback, a line too many), a *hang*, a write *outside* of the working folder, or an input that must
not be accepted and is (*wrong*). The last line of stdout is one JSON object with the counts, FILE also names what was
accepted; the exit code is 0 when there are no findings.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import RushesError

ENDS_S = 60.0  # for one input: the first ones import libraries
KINDS = ("internal", "hang", "outside", "wrong")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input. `run` reads it, in the working folder: it returns, or raises `RushesError`."""

    area: str
    name: str
    run: Callable[[], Any]
    must_refuse: bool = False


@dataclass
class Findings:
    """What came of the inputs."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)  # area -> accepted, refused or a kind of finding
    findings: list[dict[str, str]] = field(default_factory=list)
    accepted: dict[str, list[str]] = field(default_factory=dict)  # area -> names, to be looked through
    slowest_s: float = 0.0

    def add(self, case: Case, outcome: str, detail: str = "") -> None:
        self.counts.setdefault(case.area, Counter())[outcome] += 1
        if outcome == "accepted":
            self.accepted.setdefault(case.area, []).append(case.name)
        if outcome in KINDS:
            self.findings.append({"area": case.area, "name": case.name, "kind": outcome, "detail": detail})
            print(json.dumps(self.findings[-1]), file=sys.stderr, flush=True)

    def report(self, seed: int, seconds: float) -> dict[str, Any]:
        total = sum((counts for counts in self.counts.values()), Counter[str]())
        return {
            "seed": seed,
            "inputs": total.total(),
            "seconds": round(seconds, 1),
            "slowest_s": round(self.slowest_s, 2),
            **{kind: total[kind] for kind in ("accepted", "refused", *KINDS)},
            "areas": {area: dict(sorted(counts.items())) for area, counts in sorted(self.counts.items())},
            "findings": self.findings[:50],
        }


class Hang(BaseException):
    """The time for one input is over."""


class Sandbox:
    """`with Sandbox() as box:` a working folder that is the current one; what is opened for writing elsewhere is noted
    in `outside`."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="rushes-fuzz-")).resolve()
        self.work, self.temporary = self.root / "work", self.root / "tmp"
        self.outside: list[str] = []
        self._on = False

    def __enter__(self) -> Sandbox:
        self._before = Path.cwd(), tempfile.tempdir, sys.dont_write_bytecode
        self._variables = {name: os.environ.get(name) for name in ("HOME", "MPLCONFIGDIR")}
        os.environ.update(dict.fromkeys(self._variables, str(self.temporary)))
        for folder in (self.work, self.temporary):
            folder.mkdir()
        os.chdir(self.work)
        tempfile.tempdir, sys.dont_write_bytecode = str(self.temporary), True
        self._on = True
        sys.addaudithook(self._watch)  # stays for the rest of the process, and is quiet once `_on` is False
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        folder, tempfile.tempdir, sys.dont_write_bytecode = self._before
        os.chdir(folder)
        for name, value in self._variables.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(self.root, ignore_errors=True)

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        paths: tuple[Any, ...] = ()
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else 0
            if writes or any(letter in (mode or "") for letter in "wax+"):
                paths = (path,)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"):
            paths = arguments[:1]
        elif event in ("os.symlink", "os.link"):
            paths = arguments[1:2]
        elif event == "os.rename":
            paths = arguments[:2]
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                full = os.path.abspath(os.fsdecode(path))
                if not full.startswith((str(self.work), str(self.temporary), "/dev/", "/proc/")):
                    self.outside.append(f"{event} {full}")

    def strangers(self) -> list[str]:
        """What lies beside the working folder and should not."""
        return sorted(path.name for path in self.root.iterdir() if path not in (self.work, self.temporary))


def run_cases(cases: Iterator[Case], box: Sandbox, findings: Findings, ends_s: float = ENDS_S) -> None:
    def over(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, over)
    try:
        for case in cases:
            started, box.outside = time.monotonic(), []
            signal.setitimer(signal.ITIMER_REAL, ends_s)
            outcome, detail = _outcome(case)
            signal.setitimer(signal.ITIMER_REAL, 0)
            findings.slowest_s = max(findings.slowest_s, time.monotonic() - started)
            if outcome == "accepted" and case.must_refuse:
                outcome = "wrong"
            if box.outside or box.strangers():
                outcome, detail = "outside", "; ".join([*box.outside, *box.strangers()])[:300]
                for name in box.strangers():
                    shutil.rmtree(box.root / name, ignore_errors=True)
            findings.add(case, outcome, detail)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _outcome(case: Case) -> tuple[str, str]:
    try:
        case.run()
    except RushesError as error:
        text = str(error)
        if "\n" in text or "internal error" in text or "Traceback" in text or len(text) > 4000:
            return "internal", text[:600]
        return "refused", text
    except Hang:
        return "hang", ""
    except BaseException as error:  # whatever is no error of ours is a finding, SystemExit too
        where = traceback.format_exception(error)[-3:]
        return "internal", f"{type(error).__name__}: {error} | {' '.join(''.join(where).split())}"[:900]
    return "accepted", ""


def rushes(*arguments: str) -> None:
    """A command in this process. Raises `RushesError` with its line when it refuses."""
    from jobs import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(arguments))
    lines = err.getvalue()
    if status == 70 or "Traceback" in lines or "internal error" in lines:
        raise AssertionError(f"rushes {' '.join(arguments)[:200]}: {lines[-600:]}")
    errors = [line for line in lines.splitlines() if line.startswith("error: ")]
    if status not in (0, 1, 2) or len(errors) > 1 or (status and not errors and not out.getvalue()):
        raise AssertionError(f"rushes {' '.join(arguments)[:200]}: status {status}, stderr {lines[-600:]!r}")
    if status:
        raise RushesError(errors[0] if errors else out.getvalue()[-300:].replace("\n", " "))


def areas() -> dict[str, Callable[[Path, random.Random], Iterator[Case]]]:
    """The cases of each area, made in the working folder."""
    from benchmarks.resilience import fuzz_areas, fuzz_files, fuzz_http

    return fuzz_areas.AREAS | fuzz_files.AREAS | fuzz_http.AREAS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=areas(), help="one area")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args(argv)
    started, findings = time.monotonic(), Findings()
    with Sandbox() as box:
        for name, cases in areas().items():
            if options.only in (None, name):
                run_cases(cases(box.work, random.Random(f"{options.seed} {name}")), box, findings)
    result = findings.report(options.seed, time.monotonic() - started)
    if options.report is not None:
        options.report.write_text(json.dumps(result | {"accepted_inputs": findings.accepted}, indent=1) + "\n")
    print(json.dumps(result))
    return int(bool(findings.findings))


if __name__ == "__main__":
    sys.exit(main())
