"""What `rushes submit` checks before it uploads anything, and the Ray job that it then makes of a run."""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Callable, Iterator
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.cluster.client import RUN_KEY, TERMINAL, refused
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, InputError, RunInterrupted, one_line
from pipeline.runs.paths import check_name, default_name

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXCLUDES = (
    ".git", ".venv", "venv", ".tox", "node_modules", "__pycache__", "*.pyc", "*.egg-info", ".mypy_cache",
    ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints", "wandb", "mlruns", "runs", "generated",
)  # fmt: skip
KEY_FILES = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "id_rsa*",
    "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".pypirc", ".npmrc", ".pgpass", ".htpasswd",
    ".git-credentials", "credentials", "credentials.*", "*credentials.json", "client_secret*.json",
    "*service[-_]account*.json", "secrets", "secrets.*", ".secrets*", "kubeconfig*", ".ssh", ".aws", ".azure",
    ".gnupg", ".kube", ".docker", ".boto", ".s3cfg", ".vault-token", "hf_token*",
)  # fmt: skip
"""Names, in lower case, of files and folders that usually hold keys; they are never uploaded (sources are)."""
MAX_UPLOAD = 500 * 2**20  # bytes; Ray's own limit is 512 MiB
STOP_WAIT_S = 600  # that `ray job stop` leaves the run for its last checkpoint; Ray's default of 3 s is too short


def resume_option(resume: bool, or_start: bool) -> str:
    """The option of `rushes train` that does the same; "" for a new run. Raises `ConfigError` when both are given."""
    if resume and or_start:
        raise ConfigError("submit: --resume and --resume-or-start: give one of them; the latter also resumes")
    return "--resume" if resume else "--resume-or-start" if or_start else ""


def run_name(cfg: Config, config: Path, resume_flag: str) -> str:
    """The run's name, chosen before it starts so that it can be found. `resume_flag`: see `resume_option`. Raises
    `ConfigError`."""
    if resume_flag and cfg.run.name is None:
        raise ConfigError(f"submit {resume_flag}: say which run, such as run.name=NAME")
    name = cfg.run.name or default_name(config, datetime.now(), Path("/nonexistent"))
    check_name(name)
    return name


def path_inside(config: Path, working_dir: Path) -> Path:
    """`config` relative to the uploaded folder. Raises `RushesError` kinds when it is not in there."""
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
    """Raises `ConfigError` for a relative run.dir, which would lie in the uploaded copy that the cluster deletes."""
    if not os.path.isabs(cfg.run.dir):
        raise ConfigError(
            f"run.dir: {str(cfg.run.dir)!r} is relative, so the run would be lost with the job's temporary folder; "
            "give an absolute path that all nodes see, such as run.dir=/data/runs"
        )


def _files(folder: Path, excludes: list[str]) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not any(fnmatch(name, pattern) for pattern in excludes)]
        for name in files:
            if not any(fnmatch(name, pattern) for pattern in excludes):
                yield Path(root, name)


def key_files(folder: Path, excludes: list[str]) -> list[str]:
    """The files and folders, relative to `folder`, that are not uploaded because such names usually hold keys."""

    def is_key(path: Path) -> bool:
        names = {path.name.lower(), path.resolve().name.lower()}  # also what a link leads to
        return any(
            fnmatch(name, pattern) and not name.endswith((".py", ".md")) for name in names for pattern in KEY_FILES
        )

    found: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not any(fnmatch(name, pattern) for pattern in excludes)]
        here = [path for name in [*folders, *files] if is_key(path := Path(root, name))]
        folders[:] = [name for name in folders if Path(root, name) not in here]
        found += here
    return sorted(path.relative_to(folder).as_posix() for path in found)


def check_size(folder: Path, excludes: list[str], limit: int = MAX_UPLOAD) -> None:
    """Raises `ConfigError` naming the largest parts when more than `limit` bytes would be uploaded. (Counts files that
    .gitignore names, although Ray does not upload them.)"""
    parts: dict[str, int] = {}
    for path in _files(folder, excludes):
        top = path.relative_to(folder).parts[0]
        parts[top] = parts.get(top, 0) + (path.stat().st_size if path.is_file() else 0)
    total = sum(parts.values())
    if total <= limit:
        return
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in largest)
    raise ConfigError(
        f"submit: {folder.resolve()} holds {total / 2**20:,.0f} MiB ({named}), at most {limit / 2**20:,.0f} can be "
        "uploaded; leave parts out with --exclude NAME, and put models on storage that all nodes see"
    )


def entrypoint(cfg: Config, config: Path, overrides: list[str], name: str, resume_flag: str) -> str:
    """The command that the cluster runs, in the uploaded folder. `python -m` takes the sources that are uploaded, and
    the installed package where there are none."""
    kept = [item for item in overrides if not item.startswith("run.name=")]
    if cfg.ray.address is not None:
        kept = [*kept, "ray.address=auto"]  # the cluster it is in, whatever the config says
    command = ["python", "-m", "jobs.cli", "train", str(config), *kept, f"run.name={name}"]
    return shlex.join([*command, *([resume_flag] if resume_flag else [])])


def refuse_running(client: JobSubmissionClient, name: str, where: str) -> None:
    for job in client.list_jobs():
        if (job.metadata or {}).get(RUN_KEY) == name and job.status not in TERMINAL:
            raise ConfigError(
                f"run.name: a run {name!r} is already running at {where} (job {job.submission_id}); follow it with "
                f"rushes logs {name} -f, stop it with rushes stop {name}, or choose another name"
            )


def submit_job(
    client: JobSubmissionClient,
    where: str,
    command: str,
    name: str,
    working_dir: Path,
    exclude: list[str],
    keys: list[str],
) -> str:
    """The job's id. `keys`: the `key_files` to leave out. Raises `ConfigError`."""
    try:
        return client.submit_job(
            entrypoint=command,
            submission_id=f"{name}-{datetime.now():%Y%m%d-%H%M%S}",
            metadata={RUN_KEY: name},
            runtime_env={
                "working_dir": str(working_dir),
                "excludes": [*EXCLUDES, *exclude, *(f"/{glob.escape(name)}" for name in keys)],
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
            },
        )
    except (RuntimeError, ValueError, ConnectionError, OSError) as error:
        raise refused(where, error) from error


def exit_code(client: JobSubmissionClient, job: str, note: Callable[[str], None]) -> int:
    """Exit status of an ended job: the run's own, 130 when it was stopped, 1 when Ray does not know. `note` receives a
    line about a job that failed without an exit code."""
    info = client.get_job_info(job)
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return RunInterrupted.exit_code
    if info.driver_exit_code is None or info.driver_exit_code < 0:  # its node is gone, or a signal
        note(f"job {job} failed: {one_line(info.message or 'no reason given', 300)}")
    return abs(info.driver_exit_code or 1) % 256 or 1
