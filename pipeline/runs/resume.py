"""Which folder a run is written to: a new one, or that of the run which `--resume` continues."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, RushesError, one_line
from pipeline.core.files import describe_os_error
from pipeline.core.storage import display_path, url_of
from pipeline.runs import checkpoint, remote_sync
from pipeline.runs.paths import RunDir, check_name, default_name


def create(cfg: Config, config_path: Path, now: datetime | None = None) -> RunDir:
    """A new run's folder. Raises `ConfigError` when the name is taken or cannot be a folder, `RushesError` on I/O."""
    name = cfg.run.name or default_name(config_path, now or datetime.now(), cfg.run.dir)
    check_new(cfg, name)
    run = RunDir(cfg.run.dir / name)
    try:
        cfg.run.dir.mkdir(parents=True, exist_ok=True)
        run.path.mkdir()
    except OSError as error:
        raise RushesError(f"cannot create the run's folder {describe_os_error(error, run.path)}") from error
    return run


def check_new(cfg: Config, name: str | None) -> None:
    """Raises `ConfigError` when a new run cannot have that name (None: one that is free), or `run.dir` is a file."""
    if name is not None:
        check_name(name)
        path = cfg.run.dir / name
        if path.exists() or remote_sync.exists(path):
            raise ConfigError(
                f"run.name: a run {name!r} exists in {display_path(cfg.run.dir)}; continue it with --resume or choose "
                "another name"
            )
    if cfg.run.dir.exists() and not cfg.run.dir.is_dir():
        raise ConfigError(f"run.dir: {cfg.run.dir} is a file; give the folder that holds all runs")


def check_retried(cfg: Config) -> None:
    """Raises `ConfigError` when `run.name` is not set, or no folder's name: a retry could not find the run."""
    if not cfg.run.name:
        raise ConfigError("--resume-or-start: run.name is not set; give one, so that every try means the same run")
    check_name(cfg.run.name)


def exists(cfg: Config) -> bool:
    """Whether there is a run `run.name`, here or in the store of `run.dir`."""
    path = cfg.run.dir / str(cfg.run.name)
    return path.is_dir() or remote_sync.exists(path)


@dataclass(frozen=True, order=True, slots=True)
class _Candidate:
    """An unfinished run, ordered by how much it is the one to resume: one that failed before its first checkpoint must
    not hide an older one that can be continued."""

    has_checkpoint: bool
    started: str  # YYYYmmdd-HHMMSS
    number: int  # of the runs that started in that second
    path: Path


def find_resumable(cfg: Config, config_path: Path) -> RunDir:
    """The run that --resume means: run.name, or the newest unfinished run of this config. Raises `ConfigError`."""
    if cfg.run.name:
        check_name(cfg.run.name)
        run = RunDir(cfg.run.dir / cfg.run.name)
        if remote_sync.exists(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        if not run.path.is_dir():
            raise ConfigError(
                f"--resume: there is no run {cfg.run.name!r} in {display_path(cfg.run.dir)}; leave --resume out "
                "to start it"
            )
        return run
    if url := url_of(cfg.run.dir):
        raise ConfigError(f"--resume: name the run in {url} to continue, such as run.name=NAME")
    stem = re.escape(config_path.stem)
    pattern = re.compile(rf"{stem}-(\d{{8}}-\d{{6}})(?:-(\d+))?$")
    candidates: list[_Candidate] = []
    for path in cfg.run.dir.iterdir() if cfg.run.dir.is_dir() else []:
        match = pattern.match(path.name)
        if match and path.is_dir() and not RunDir(path).finished:
            saved = any((path / "checkpoints").glob(f"step-*/{remote_sync.MANIFEST}"))
            candidates.append(_Candidate(saved, match.group(1), int(match.group(2) or 1), path))
    if not candidates:
        raise ConfigError(
            f"--resume: no unfinished run of {config_path.stem!r} in {cfg.run.dir}; "
            "name one with run.name=..., or leave --resume out to start a new one"
        )
    return RunDir(max(candidates).path)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedRun:
    """A run's folder, and whether the run in it is resumed rather than new."""

    folder: RunDir
    resumed: bool


def resume_or_create(cfg: Config, config_path: Path) -> OpenedRun:
    """The run `run.name` if it exists, else a new one of that name: for jobs that are retried.

    Raises `ConfigError` when run.name is not set: a retry could not find the run.
    """
    check_retried(cfg)
    if exists(cfg):
        return OpenedRun(folder=find_resumable(cfg, config_path), resumed=True)
    return OpenedRun(folder=create(cfg, config_path), resumed=False)


def check_resume(cfg: Config, config_path: Path, or_start: bool) -> str:
    """What `run_training` would refuse to resume, for a dry run; writes nothing in the run's folder. Returns what a
    resume would do, as text."""
    if or_start:
        check_retried(cfg)
        if not exists(cfg):
            return f"none yet: {cfg.run.name} would be started"
    run = find_resumable(cfg, config_path)
    found = checkpoint.newest(run.checkpoints)
    saved = found.folder
    if saved is None:
        return f"{run.name} has no checkpoint yet and would start over"
    if not (or_start and complete(cfg, run, saved)):
        check_saved(cfg, run, saved)
    changed = "".join(f"; {note}" for note in found.notes)
    changed += "".join(f"; changed: {change}" for change in changed_keys(cfg, run))
    return f"{run.name} from step {checkpoint.step_of(saved)} of {cfg.run.steps}{changed}"


def check_saved(cfg: Config, run: RunDir, saved: Path) -> None:
    """Raises `CheckpointError` for another config, `ConfigError` for a run that has finished."""
    checkpoint.check_config(saved, cfg)
    if complete(cfg, run, saved):
        raise ConfigError(
            f"--resume: run {run.name} has finished all {checkpoint.step_of(saved)} steps; "
            "raise run.steps to continue, or leave --resume out to start a new one"
        )


def complete(cfg: Config, run: RunDir, saved: Path | None) -> bool:
    """Whether the run has finished, and its last checkpoint has all the steps that the config wants."""
    return saved is not None and run.finished and checkpoint.step_of(saved) >= cfg.run.steps


def changed_keys(cfg: Config, run: RunDir) -> list[str]:
    """Keys with another value than when the run was last started."""
    try:
        return checkpoint.changes(load_config(run.config), cfg)
    except RushesError as error:  # of another version, or damaged; it is written anew
        return [f"{run.config} could not be read ({one_line(error)})"]
