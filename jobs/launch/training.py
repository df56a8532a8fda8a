"""The driver of a run (`rushes train`): checks, run folder and lock, Ray, the supervised controller, the summary."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

from jobs.cluster.forked_workers import forked_workers
from jobs.cluster.ray_session import MemorySampler, RaySession
from jobs.common.options import say
from jobs.launch.stop_signals import StopSignals
from jobs.launch.summary import summarise
from jobs.launch.supervise import supervise
from pipeline.config.load import to_yaml, with_absolute_paths
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, RunInterrupted
from pipeline.core.files import atomic_write
from pipeline.core.storage import url_of
from pipeline.runs import checkpoint
from pipeline.runs.lock import RunLock
from pipeline.runs.log import setup_logging
from pipeline.runs.paths import RunDir
from pipeline.runs.remote_sync import RemoteSync
from pipeline.runs.resume import changed_keys, check_saved, complete, create, find_resumable, resume_or_create

log = logging.getLogger("rushes.driver")


def run_training(
    cfg: Config,
    config_path: Path,
    resume: bool = False,
    or_start: bool = False,
    debug: bool = False,
    console: Console | None = None,
) -> int:
    """A whole run. Returns 0; raises `RushesError` (`RunInterrupted` after a signal, with a checkpoint saved).

    `resume`: continues an existing run; it is an error if there is none. `or_start`: continues the run `run.name`,
    starts it if it does not exist, and does nothing if it has finished.
    """
    from pipeline.tools.preflight import check_all

    console = console or Console()
    check_all(cfg)
    if or_start and resume:
        raise ConfigError("--resume and --resume-or-start: give one of them; the latter also resumes")
    if or_start:
        opened = resume_or_create(cfg, Path(config_path))
        run, resume = opened.folder, opened.resumed
    else:
        run = find_resumable(cfg, Path(config_path)) if resume else create(cfg, Path(config_path))
    with RunLock(run), RemoteSync(run):
        found = _newest_checkpoint(run) if resume else checkpoint.Newest(None, [])
        saved = found.folder
        if or_start and complete(cfg, run, saved):
            say(console, f"run {run.path} has finished all {cfg.run.steps} steps")
            return 0
        resume_from = _resume_point(cfg, run, saved)
        changed = changed_keys(cfg, run) if resume_from else []
        atomic_write(run.config, to_yaml(with_absolute_paths(cfg)).encode())
        setup_logging(run, "driver")
        say(console, f"run {run.path}")
        if url := url_of(run.path):
            say(console, f"mirrored to {url}")
        if resume:
            start = checkpoint.step_of(resume_from) if resume_from else 0
            say(console, f"resuming at step {start} of {cfg.run.steps}")
            for note in found.notes:
                say(console, note)
                log.warning("%s", note)
            for change in changed:
                say(console, f"changed since it last ran: {change}")
                log.info("changed since it last ran: %s", change)
        say(console, "starting: Ray")
        sampler = MemorySampler()
        sampler.start()
        signals = StopSignals()
        try:
            with signals, forked_workers(cfg) as python, RaySession(cfg, signals.check, python) as session:
                signals.install()  # replaces Ray's handler, which prints a stack to stderr first
                signals.session = session
                result = supervise(cfg, run, resume_from, signals, console, debug)
                ours = session.ours
        finally:
            peak = sampler.stop()
        if result["status"] == "stopped":
            raise RunInterrupted(_stopped(cfg, config_path, run, result["checkpoint"], result["step"]))
        summarise(cfg, run, result, peak if ours else peak + sum(result["peaks"].values()), console)
    return 0


def _newest_checkpoint(run: RunDir) -> checkpoint.Newest:
    checkpoint.remove_partial(run.path)
    return checkpoint.newest(run.checkpoints, writing=True)


def _stopped(cfg: Config, config_path: Path, run: RunDir, saved: str | None, step: int) -> str:
    where = f"at step {step} of {cfg.run.steps}, checkpoint {saved}" if saved else "before there was anything to save"
    return f"stopped {where}; continue with: rushes train {config_path} --resume run.name={run.name}"


def _resume_point(cfg: Config, run: RunDir, saved: Path | None) -> Path | None:
    """The checkpoint to continue from; None: the run has none yet and starts over in its folder."""
    if saved is None:
        return None
    check_saved(cfg, run, saved)
    run.summary.unlink(missing_ok=True)
    return saved
