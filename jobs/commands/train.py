"""`rushes train`: checks, Ray, the controller, what is shown, signals, and the summary at the end."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from jobs.cluster.ray_session import MemorySampler, RaySession
from jobs.launch.supervise import supervise
from pipeline.config.load import to_yaml
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, RunInterrupted
from pipeline.core.files import atomic_write
from pipeline.core.storage import shown, url_of
from pipeline.rl.group_plan import EVALUATION_SEED
from pipeline.runs import checkpoint
from pipeline.runs.paths import RunDir, RunLock, create, find_resumable, resume_or_create, setup_logging

PACKAGES = ("rushes", "torch", "diffusers", "transformers", "peft", "ray")


def train(
    cfg: Config,
    config_path: Path,
    resume: bool = False,
    or_start: bool = False,
    debug: bool = False,
    console: Console | None = None,
) -> int:
    """A whole run. Returns 0; raises `RushesError` (`RunInterrupted` after a signal, with a checkpoint saved).

    `resume`: goes on with an existing run, which must be there. `or_start`: with the run `run.name`, which is started
    if it is not there, and left alone if it has finished.
    """
    from pipeline.tools.preflight import check_all

    console = console or Console()
    check_all(cfg)
    if or_start and resume:
        raise ConfigError("--resume and --resume-or-start: give one of them; the latter also resumes")
    if or_start:
        run, resume = resume_or_create(cfg, Path(config_path))
    else:
        run = find_resumable(cfg, Path(config_path)) if resume else create(cfg, Path(config_path))
    with RunLock(run):
        saved = checkpoint.latest(run.checkpoints) if resume else None
        if or_start and _complete(cfg, run, saved):
            console.print(f"run {run.path} has finished all {cfg.run.steps} steps", highlight=False, soft_wrap=True)
            return 0
        resume_from = _resume_point(cfg, run, saved)
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
                signals.session = session
                result = supervise(cfg, run, resume_from, signals, console, debug)
                ours = session.ours
        finally:
            peak = sampler.stop()
        if result["status"] == "stopped":
            raise RunInterrupted(_stopped(cfg, config_path, run, result["checkpoint"], result["step"]))
        _summarise(cfg, run, result, peak if ours else peak + sum(result["peaks"].values()), console)
    return 0


def _stopped(cfg: Config, config_path: Path, run: RunDir, saved: str | None, step: int) -> str:
    what = f"at step {step} of {cfg.run.steps}, checkpoint {saved}" if saved else "before there was anything to save"
    return f"stopped {what}; continue with: rushes train {config_path} --resume run.name={run.name}"


def _complete(cfg: Config, run: RunDir, saved: Path | None) -> bool:
    return saved is not None and run.finished and checkpoint.step_of(saved) >= cfg.run.steps


def _resume_point(cfg: Config, run: RunDir, saved: Path | None) -> Path | None:
    """The checkpoint to go on from; None: the run never got to one and starts over in its folder."""
    if saved is None:
        return None
    checkpoint.check_config(saved, cfg)
    if _complete(cfg, run, saved):
        raise ConfigError(
            f"--resume: run {run.name} has finished all {checkpoint.step_of(saved)} steps; "
            "raise run.steps to go on, or leave --resume out to start a new one"
        )
    run.summary.unlink(missing_ok=True)
    return saved


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
    from pipeline.tools.report.report import build_report

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
            "peak_rss_mb_roles": {name: round(size / 2**20, 1) for name, size in sorted(result["peaks"].items())},
            "seeds": {"run": cfg.run.seed, "evaluation": EVALUATION_SEED},
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
