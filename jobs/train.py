"""`rushes train`: checks, Ray, the controller, what is shown, signals, and the summary at the end."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import signal
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from jobs.live import controller_options, running
from jobs.local_ray import MemorySampler, RaySession
from jobs.progress import View, make_view
from pipeline import checkpoint
from pipeline.config import Config
from pipeline.config_io import to_yaml
from pipeline.errors import ConfigError, RunFailed, RunInterrupted, RushesError
from pipeline.files import atomic_write
from pipeline.run_dir import RunDir, RunLock, create, find_resumable, setup_logging
from pipeline.storage import shown, url_of

POLL_S = 0.5
PACKAGES = ("rushes", "torch", "diffusers", "transformers", "peft", "ray")


def train(
    cfg: Config, config_path: Path, resume: bool = False, debug: bool = False, console: Console | None = None
) -> int:
    """A whole run. Returns 0; raises `RushesError` (`RunInterrupted` after a signal, with a checkpoint saved)."""
    from pipeline.preflight import check_all

    console = console or Console()
    check_all(cfg)
    run = find_resumable(cfg, Path(config_path)) if resume else create(cfg, Path(config_path))
    with RunLock(run):
        resume_from = _resume_point(cfg, run) if resume else None
        atomic_write(run.config, to_yaml(cfg).encode())
        setup_logging(run, "driver")
        console.print(f"run {run.path}", highlight=False, soft_wrap=True)
        if url := url_of(run.path):
            console.print(f"mirrored to {url}", highlight=False, soft_wrap=True)
        if resume:
            start = checkpoint.step_of(resume_from) if resume_from else 0
            console.print(f"resuming at step {start} of {cfg.run.steps}", highlight=False)
        sampler = MemorySampler()
        sampler.start()
        signals = _Signals()
        try:
            with signals, RaySession(cfg) as session:
                signals.install()  # over Ray's native one, which prints a stack to stderr before it calls ours
                result = _drive(cfg, run, resume_from, session, signals, console, debug)
                ours = session.ours
        finally:
            peak = sampler.stop()
        if result["status"] == "stopped":
            raise RunInterrupted(_stopped(cfg, config_path, run, result["checkpoint"], result["step"]))
        _summarise(cfg, run, result, peak if ours else peak + result["peak_rss"], console)
    return 0


def _stopped(cfg: Config, config_path: Path, run: RunDir, saved: str | None, step: int) -> str:
    what = f"at step {step} of {cfg.run.steps}, checkpoint {saved}" if saved else "before there was anything to save"
    return f"stopped {what}; continue with: rushes train {config_path} --resume run.name={run.name}"


def _resume_point(cfg: Config, run: RunDir) -> Path | None:
    """The checkpoint to go on from; None: the run never got to one and starts over in its folder."""
    folder = checkpoint.latest(run.checkpoints)
    if folder is None:
        return None
    checkpoint.check_config(folder, cfg)
    if run.finished and checkpoint.step_of(folder) >= cfg.run.steps:
        raise ConfigError(
            f"--resume: run {run.name} has finished all {checkpoint.step_of(folder)} steps; "
            "raise run.steps to go on, or leave --resume out to start a new one"
        )
    run.summary.unlink(missing_ok=True)
    return folder


class _Signals:
    """First SIGINT or SIGTERM: `asked` becomes True. Second: everything ends at once with exit code 130."""

    def __init__(self) -> None:
        self.asked = False
        self.session: RaySession | None = None

    def __enter__(self) -> _Signals:
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
        if self.asked:
            if self.session is not None:
                self.session.kill()
            os.write(1, b"\x1b[?25h\n" if os.isatty(1) else b"")  # the live view has hidden the cursor
            os._exit(RunInterrupted.exit_code)
        self.asked = True


def _drive(
    cfg: Config,
    run: RunDir,
    resume_from: Path | None,
    session: RaySession,
    signals: _Signals,
    console: Console,
    debug: bool,
) -> dict[str, Any]:
    """Starts the controller and shows its progress until it ends. Raises what ended the run."""
    import ray

    from actors.common import RunContext, actor_env
    from actors.controller import Controller
    from actors.failures import describe, root

    signals.session = session
    if run.name in running():
        raise ConfigError(
            f"run.name: a run {run.name!r} is going on in this cluster; watch it with rushes watch {run.name}, or use "
            "another run.name"
        )
    ctx = RunContext(cfg=cfg, run_path=str(run.path.absolute()), cwd=os.getcwd())
    controller = (
        ray.remote(Controller)
        .options(num_cpus=0, runtime_env={"env_vars": actor_env(1)}, **controller_options(run))
        .remote(ctx, str(resume_from.absolute()) if resume_from else None)
    )
    view = make_view(console, run.name)
    try:
        result = _watch(controller, controller.run.remote(), view, signals)
        if result["status"] == "stopped" and not signals.asked:  # by `rushes stop`
            stop_own_job()
        return result
    except ray.exceptions.RayError as error:
        if debug:
            raise
        cause = root(error)
        if isinstance(cause, RushesError):
            raise cause from None
        raise RunFailed(f"controller on {os.uname().nodename}: {describe(error)} (see {run.log})") from error
    finally:
        view.close()
        ray.kill(controller)


def _watch(controller: Any, ended: Any, view: View, signals: _Signals) -> dict[str, Any]:
    import ray

    seen, told = 0, False
    while True:
        ready, _ = ray.wait([ended], timeout=POLL_S)
        if signals.asked and not told:
            told = True
            view.note("stopping: saving the last completed step (Ctrl-C again stops at once)")
            controller.stop.remote()
        try:
            snapshot = ray.get(controller.progress.remote(seen), timeout=60)
        except ray.exceptions.GetTimeoutError:
            continue
        except ray.exceptions.RayError:
            return ray.get(ended)  # the controller is gone: this raises why
        seen += len(snapshot["records"])
        view.update(snapshot)
        if ready:
            return ray.get(ended)


def stop_own_job() -> None:
    """Marks the Ray job that this process is, if it is one, as stopped: with the exit code alone Ray would call it
    failed, and what retries failed jobs (a RayJob) would start it again."""
    import ray
    from ray.job_submission import JobSubmissionClient

    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata") or {}
    if job := metadata.get("job_submission_id"):
        try:
            JobSubmissionClient(ray.get_runtime_context().gcs_address).stop_job(job)
        except (RuntimeError, ConnectionError, ValueError, OSError) as error:
            logging.getLogger("rushes.driver").warning("the job could not be marked as stopped: %s", error)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _summarise(cfg: Config, run: RunDir, result: dict[str, Any], peak: int, console: Console) -> None:
    """summary.json and the report, whose path is the last line shown."""
    from pipeline.report import build_report

    evals = result["evals"]
    heldout = None
    if evals:
        first, last = evals[0], evals[-1]
        keys = ("mean", "se", "n")
        heldout = {
            "before": {key: first[key] for key in keys},
            "after": {key: last[key] for key in keys},
            "rewards": {
                name: {"before": first["rewards"][name], "after": last["rewards"][name]} for name in last["rewards"]
            },
        }
    started = psutil.Process().create_time()

    def write() -> None:
        summary = {
            "status": "finished",
            "run": run.name,
            "heldout": heldout,
            "steps": result["step"],
            "takes": result["takes"],
            "groups": result["groups"],
            "retries": result["retries"],
            "wall_s": round(time.time() - started, 2),
            "peak_rss_mb": round(peak / 2**20, 1),
            "seeds": {"run": cfg.run.seed, "evaluation": cfg.evaluation.seed},
            "versions": _versions(),
            "checkpoint": result["checkpoint"],
            "export": result["export"],
            "report": str(run.report),
        }
        atomic_write(run.summary, json.dumps(summary, indent=2).encode())

    write()
    build_report(run.path)
    write()  # with the report's own time
    if heldout:
        before, after = heldout["before"], heldout["after"]
        gain = after["mean"] - before["mean"]
        error = (before["se"] ** 2 + after["se"] ** 2) ** 0.5
        console.print(
            f"held-out reward {before['mean']:.4f} -> {after['mean']:.4f} "
            f"({gain:+.4f} ± {error:.4f}, n = {after['n']})",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"export  {shown(Path(result['export']))}", highlight=False, soft_wrap=True)
    console.print(f"report  {shown(run.report)}", highlight=False, soft_wrap=True)
