"""The folder of a run: paths, its name, which run a resume means, the lock that makes it one process's, its log."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, RushesError
from pipeline.core.files import describe_os_error
from pipeline.core.storage import shown, url_of
from pipeline.runs import remote_sync

_HANDLER = "rushes run.log"
_SECRET_NAME = re.compile(r"(token|secret|password|passwd|api_?key|credential)", re.IGNORECASE)
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class RunDir:
    """Paths inside runs/<name>/."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evals(self) -> Path:
        return self.path / "evals.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def eval_takes(self, step: int) -> Path:
        return self.path / "eval" / f"step-{step:06d}"

    def train_takes(self, step: int) -> Path:
        return self.path / "takes" / f"step-{step:06d}"

    @property
    def finished(self) -> bool:
        try:
            return json.loads(self.summary.read_text()).get("status") == "finished"
        except (OSError, ValueError):
            return False


def default_name(config_path: Path, now: datetime, taken: Path) -> str:
    """`<config stem>-YYYYmmdd-HHMMSS`, with -2, -3, ... when two runs start in one second."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", config_path.stem).strip("-.") or "run"
    name = f"{stem}-{now:%Y%m%d-%H%M%S}"
    number, unique = 1, name
    while (taken / unique).exists():
        number += 1
        unique = f"{name}-{number}"
    return unique


def check_name(name: str) -> None:
    """Raises `ConfigError` for what cannot be a run's name."""
    if not _RUN_NAME.fullmatch(name):
        raise ConfigError(
            f"run.name: {name!r} cannot be a folder's name; use letters, digits, '.', '_' and '-' (at most 100)"
        )


def create(cfg: Config, config_path: Path, now: datetime | None = None) -> RunDir:
    """A new run's folder. Raises `ConfigError` when the name is taken or cannot be a folder, `RushesError` on I/O."""
    name = cfg.run.name or default_name(config_path, now or datetime.now(), cfg.run.dir)
    check_name(name)
    run = RunDir(cfg.run.dir / name)
    if run.path.exists() or remote_sync.exists(run.path):
        raise ConfigError(
            f"run.name: a run {name!r} exists in {shown(cfg.run.dir)}; continue it with --resume or choose another name"
        )
    if cfg.run.dir.exists() and not cfg.run.dir.is_dir():
        raise ConfigError(f"run.dir: {cfg.run.dir} is a file; give the folder that holds all runs")
    try:
        cfg.run.dir.mkdir(parents=True, exist_ok=True)
        run.path.mkdir()
    except OSError as error:
        raise RushesError(f"cannot create the run's folder {describe_os_error(error, run.path)}") from error
    return run


def find_resumable(cfg: Config, config_path: Path) -> RunDir:
    """The run that --resume means: run.name, or the newest unfinished run of this config. Raises `ConfigError`."""
    if cfg.run.name:
        check_name(cfg.run.name)
        run = RunDir(cfg.run.dir / cfg.run.name)
        if remote_sync.exists(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        if not run.path.is_dir():
            raise ConfigError(
                f"--resume: there is no run {cfg.run.name!r} in {shown(cfg.run.dir)}; leave --resume out to start it"
            )
        return run
    if url := url_of(cfg.run.dir):
        raise ConfigError(f"--resume: say which run of {url} is meant, such as run.name=NAME")
    stem = re.escape(config_path.stem)
    pattern = re.compile(rf"{stem}-(\d{{8}}-\d{{6}})(?:-(\d+))?$")
    found = []
    for path in cfg.run.dir.iterdir() if cfg.run.dir.is_dir() else []:
        match = pattern.match(path.name)
        if match and path.is_dir() and not RunDir(path).finished:
            # One that failed before its first checkpoint must not hide an older one that has something to continue.
            saved = any((path / "checkpoints").glob("step-*/MANIFEST.json"))
            found.append((saved, match.group(1), int(match.group(2) or 1), path))
    if not found:
        raise ConfigError(
            f"--resume: no unfinished run of {config_path.stem!r} in {cfg.run.dir}; "
            "name one with run.name=..., or leave --resume out to start a new one"
        )
    return RunDir(max(found)[-1])


def resume_or_create(cfg: Config, config_path: Path) -> tuple[RunDir, bool]:
    """The run `run.name` and whether it was there already; else a new one of that name, for jobs that are retried.

    Raises `ConfigError` when the run has no name of its own, by which a later try could find it.
    """
    if not cfg.run.name:
        raise ConfigError("--resume-or-start: run.name is not set; give one, so that every try means the same run")
    check_name(cfg.run.name)
    run = RunDir(cfg.run.dir / cfg.run.name)
    if run.path.is_dir() or remote_sync.exists(run.path):
        return find_resumable(cfg, config_path), True
    return create(cfg, config_path), False


class RunLock:
    """Held while a process writes a run; the system frees it when the process dies. Mirrors the run, too, where
    `run.dir` is a URL."""

    def __init__(self, run: RunDir) -> None:
        self.path = run.path / ".lock"
        self._handle: IO[str] | None = None
        self._mirror: remote_sync.RemoteSync | None = None

    def acquire(self) -> RunLock:
        """Raises `RushesError` naming the process that holds it."""
        try:
            handle = open(self.path, "a+")  # noqa: SIM115 (kept open: closing it would free the lock)
        except OSError as error:
            raise RushesError(f"cannot lock the run: {describe_os_error(error, self.path)}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            handle.close()
            raise RushesError(
                f"run {self.path.parent.name} is being written by {holder}; "
                "wait for it, stop it, or use another run.name"
            ) from None
        writer = f"process {os.getpid()} on {os.uname().nodename}"
        handle.truncate(0)
        handle.write(writer)
        handle.flush()
        self._handle = handle
        try:
            self._mirror = remote_sync.RemoteSync(self.path.parent, writer).open()
        except RushesError:
            self.release()
            raise
        return self

    def release(self) -> None:
        """Raises `RushesError` when the last files of a mirrored run cannot be uploaded."""
        try:
            if self._mirror is not None:
                self._mirror.close()
        finally:
            self._close()

    def _close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def __enter__(self) -> RunLock:
        return self.acquire() if self._handle is None else self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.release()
        except RushesError as error:
            if kind is None:
                raise
            logging.getLogger("rushes.storage").error("%s", error)  # what ended the run is the news


def writer_of(run: RunDir) -> str | None:
    """`process N on HOST` while a process writes the run, else None."""
    try:
        with open(run.path / ".lock") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return handle.read().strip() or "another process"
    except OSError:
        pass
    return None


# ------------------------------------------------------------------------------------------------- the log


class _Formatter(logging.Formatter):
    """Adds the group where none is given, and replaces the values of secret-looking environment variables wherever
    they appear, tracebacks included."""

    def __init__(self, fmt: str) -> None:
        super().__init__(fmt, defaults={"group": "-"})
        self.secrets = [v for k, v in os.environ.items() if _SECRET_NAME.search(k) and len(v) >= 8]

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def setup_logging(run: RunDir, role: str, worker: str = "-") -> None:
    """Sends this process's log to run.log; every line says run, role, worker and, where known, the group
    (`log.info(..., extra={"group": 7})`). Several processes append to one file, a line at a time.
    Falls back to stderr when the file cannot be opened (a node without the shared folder)."""
    try:
        handler: logging.Handler = logging.FileHandler(run.log, mode="a", encoding="utf-8")
    except OSError:
        handler = logging.StreamHandler()
    place = f"run={run.name} role={role} worker={worker} group=%(group)s"
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s {place} %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.name == _HANDLER]:
        root.removeHandler(old)
        old.close()
    handler.name = _HANDLER
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("rushes").setLevel(logging.INFO)
    logging.captureWarnings(True)
