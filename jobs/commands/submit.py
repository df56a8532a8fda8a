"""`rushes submit`: a run as a Ray job. Everything that can be checked is checked before anything is uploaded."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cluster.client import RUN_KEY, TERMINAL, find_address, jobs_client, reachable, refused, tail
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, InputError, RunInterrupted
from pipeline.runs.paths import check_name, default_name

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from rich.console import Console

EXCLUDES = (
    ".git", ".venv", "venv", ".tox", "node_modules", "__pycache__", "*.pyc", "*.egg-info", ".mypy_cache",
    ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints", "wandb", "mlruns", "runs", "generated",
)  # fmt: skip
MAX_UPLOAD = 500 * 2**20  # bytes; Ray's own limit is 512 MiB
STOP_WAIT_S = 600  # what `ray job stop` gives the run for its last checkpoint; Ray's own 3 s would cut it off


def submit(
    config: Path,
    overrides: list[str],
    *,
    address: str | None,
    working_dir: Path,
    exclude: list[str],
    resume: bool,
    or_start: bool,
    wait: bool,
    console: Console,
) -> int:
    """Returns the run's exit code (with `wait`), 130 when it was stopped or the log was left by Ctrl-C.

    `resume`: goes on with the run `run.name`; `or_start`: the same, or starts it where it is not there.
    """
    cfg = load_config(config, overrides)
    how = resume_option(resume, or_start)
    name = run_name(cfg, config, how)
    inside = _inside(config, working_dir)
    check_storage(cfg)
    check_size(working_dir, [*EXCLUDES, *exclude])
    where = reachable(find_address(address))
    client = jobs_client(where)
    _refuse_second(client, name, where)
    job = _submit(client, where, entrypoint(cfg, inside, overrides, name, how), name, working_dir, exclude)
    at = f" --address {address}" if address else ""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(f"submitted run {name} as job {job}")
    if not wait:
        say(f"follow: rushes logs {name} -f{at}    stop: rushes stop {name}{at}")
        return 0
    try:
        for piece in tail(client, job):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        say(f"\nleft the log; the run goes on. follow: rushes logs {name} -f{at}    stop: rushes stop {name}{at}")
        return RunInterrupted.exit_code
    return exit_code(client, job, say)


def resume_option(resume: bool, or_start: bool) -> str:
    """The option of `rushes train` that does the same; "" for a new run. Raises `ConfigError` when both are given."""
    if resume and or_start:
        raise ConfigError("submit: --resume and --resume-or-start: give one of them; the latter also resumes")
    return "--resume" if resume else "--resume-or-start" if or_start else ""


def run_name(cfg: Config, config: Path, how: str) -> str:
    """Known before the run starts, so that it can be found. `how`: see `resume_option`. Raises `ConfigError`."""
    if how and cfg.run.name is None:
        raise ConfigError(f"submit {how}: say which run, such as run.name=NAME")
    name = cfg.run.name or default_name(config, datetime.now(), Path("/nonexistent"))
    check_name(name)
    return name


def _inside(config: Path, working_dir: Path) -> Path:
    if not working_dir.is_dir():
        raise InputError(f"--working-dir {working_dir}: no such folder")
    try:
        return config.resolve().relative_to(working_dir.resolve())
    except ValueError:
        raise ConfigError(
            f"submit: {config} lies outside the folder that is uploaded ({working_dir.resolve()}); copy it there, or "
            "give its folder as --working-dir"
        ) from None


def check_storage(cfg: Config) -> None:
    """A relative run.dir would lie in the uploaded copy, which the cluster deletes. Raises `ConfigError`."""
    if not os.path.isabs(cfg.run.dir):
        raise ConfigError(
            f"run.dir: {str(cfg.run.dir)!r} is relative, so the run would be lost with the job's temporary folder; "
            "give an absolute path that all nodes see, such as run.dir=/data/runs"
        )


def _files(folder: Path, excludes: list[str]) -> Iterator[Path]:
    from fnmatch import fnmatch

    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not any(fnmatch(name, pattern) for pattern in excludes)]
        for name in files:
            if not any(fnmatch(name, pattern) for pattern in excludes):
                yield Path(root, name)


def check_size(folder: Path, excludes: list[str], most: int = MAX_UPLOAD) -> None:
    """Raises `ConfigError` naming the largest parts. (Files that .gitignore names are not uploaded either, but they are
    counted here.)"""
    parts: dict[str, int] = {}
    for path in _files(folder, excludes):
        top = path.relative_to(folder).parts[0]
        parts[top] = parts.get(top, 0) + (path.stat().st_size if path.is_file() else 0)
    total = sum(parts.values())
    if total <= most:
        return
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in largest)
    raise ConfigError(
        f"submit: {folder.resolve()} holds {total / 2**20:,.0f} MiB ({named}), at most {most / 2**20:,.0f} can be "
        "uploaded; leave parts out with --exclude NAME, and put models on storage that all nodes see"
    )


def entrypoint(cfg: Config, config: Path, overrides: list[str], name: str, how: str) -> str:
    """The command that the cluster runs, in the uploaded folder. `python -m` takes the sources that are uploaded, and
    the installed package where there are none."""
    given = [item for item in overrides if not item.startswith("run.name=")]
    if cfg.ray.address is not None:
        given = [*given, "ray.address=auto"]  # the cluster it is in, whatever the config says
    words = ["python", "-m", "jobs.cli", "train", str(config), *given, f"run.name={name}"]
    return shlex.join([*words, *([how] if how else [])])


def _refuse_second(client: JobSubmissionClient, name: str, where: str) -> None:
    for job in client.list_jobs():
        if (job.metadata or {}).get(RUN_KEY) == name and job.status not in TERMINAL:
            raise ConfigError(
                f"run.name: a run {name!r} is going on at {where} (job {job.submission_id}); follow it with "
                f"rushes logs {name} -f, stop it with rushes stop {name}, or choose another name"
            )


def _submit(
    client: JobSubmissionClient, where: str, command: str, name: str, working_dir: Path, exclude: list[str]
) -> str:
    try:
        return client.submit_job(
            entrypoint=command,
            submission_id=f"{name}-{datetime.now():%Y%m%d-%H%M%S}",
            metadata={RUN_KEY: name},
            runtime_env={
                "working_dir": str(working_dir),
                "excludes": [*EXCLUDES, *exclude],
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
            },
        )
    except (RuntimeError, ValueError, ConnectionError, OSError) as error:
        raise refused(where, error) from error


def exit_code(client: JobSubmissionClient, job: str, say) -> int:
    """Of an ended job: the run's own, 130 for a stopped one, 1 where Ray knows no better."""
    info = client.get_job_info(job)
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return RunInterrupted.exit_code
    if info.driver_exit_code is None or info.driver_exit_code < 0:  # its node is gone, or a signal
        say(f"job {job} failed: {' '.join((info.message or 'no reason given').split())[:300]}")
    return abs(info.driver_exit_code or 1) % 256 or 1
