"""A run by its name or folder: a `ClusterRun` asks its controller, a `FolderRun` reads its files."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from jobs.cluster import client
from jobs.cluster.client import TERMINAL, Cluster
from pipeline.core.errors import ConfigError, RushesError
from pipeline.core.safe_paths import check_regular
from pipeline.runs.lock import writer_of, writing_process
from pipeline.runs.paths import RunDir
from pipeline.runs.remote_sync import local_run
from pipeline.runs.snapshot import RunSnapshot

POLL_S = 1.0


class FolderRun:
    """A run seen through its files: one of this machine, or one that has ended."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    @property
    def name(self) -> str:
        return self.run.name

    def snapshot(self, since: int = -1) -> RunSnapshot:
        """Like `Controller.progress`, as far as the files tell."""
        from pipeline.config.load import load_config
        from pipeline.runs.records import EvaluationRecord, read_records, read_training

        cfg = load_config(self.run.config)
        records = read_training(self.run.metrics)
        writer = writer_of(self.run)
        state = f"running ({writer})" if writer else "finished" if self.run.finished else "stopped"
        return RunSnapshot(
            state=state,
            step=int(records[-1]["step"]) if records else 0,
            steps=cfg.run.steps,
            records=records[since:],
            recorded=len(records),
            evals=read_records(self.run.evals, EvaluationRecord),
        )

    def watch(self) -> Iterator[RunSnapshot]:
        """Snapshots with the new steps, until the run ends."""
        seen = 0
        while True:
            snapshot = self.snapshot(seen)
            seen = snapshot.recorded
            yield snapshot
            if writer_of(self.run) is None:
                return
            time.sleep(POLL_S)

    def log(self, follow: bool) -> Iterator[str]:
        """The text of run.log; `follow`: as it grows, until the run ends."""
        check_regular(self.run.log)
        with open(self.run.log, encoding="utf-8", errors="replace") as file:
            while True:
                text = file.read(2**20)
                if text:
                    yield text
                elif not follow or writer_of(self.run) is None:
                    return
                else:
                    time.sleep(POLL_S)

    def stop(self, now: bool) -> None:
        """Sends SIGTERM to the process that writes the run, as Ctrl-C in its terminal does; `now`: twice, which ends it
        at once. Raises `ConfigError` if no process writes it, or one on another machine."""
        writer = writer_of(self.run)
        if writer is None:
            raise ConfigError(f"run {self.name} is not running; nothing to stop")
        process = writing_process(self.run)
        if process is None:
            raise ConfigError(
                f"run {self.name} is written by {writer}, which is no process of this machine and user that has it "
                "open; stop it there, or give its cluster's --address"
            )
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            for _ in range(2 if now else 1):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)


class ClusterRun:
    """A run that is running in a cluster."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name

    def snapshot(self, since: int = -1) -> RunSnapshot:
        return RunSnapshot.from_dict(self.cluster.call("snapshot", self.name, since=since))

    def watch(self) -> Iterator[RunSnapshot]:
        return map(RunSnapshot.from_dict, self.cluster.follow("watch", self.name))

    def stop(self, now: bool, wait: bool) -> None:
        """Asks the controller for a checkpoint and the end; `now`: kills it."""
        job = next((job for job in self.cluster.jobs_of(self.name) if job.status not in TERMINAL), None)
        if now:
            if job is not None and self.cluster.jobs is not None:
                self.cluster.jobs.stop_job(job.submission_id)  # so that Ray calls it stopped, not failed
            self.cluster.call("kill", self.name)  # its driver notices, and ends
        else:
            self.cluster.call("stop", self.name)
        if job is not None:
            if wait:
                wait_for_end(self.cluster, job)
            return
        while wait and self.name in self.cluster.running():
            time.sleep(POLL_S)


def wait_for_end(cluster: Cluster, job: Any) -> None:
    assert cluster.jobs is not None  # the job was listed through it
    while cluster.jobs.get_job_status(job.submission_id) not in TERMINAL:
        time.sleep(POLL_S)


class NoController(ConfigError):
    """The run's job exists, but no controller that could answer: the run is starting or ending."""

    def __init__(self, cluster: Cluster, name: str, job: Any) -> None:
        super().__init__(
            f"run {name!r} is starting or ending (job {job.submission_id} is {job.status}), so its controller cannot "
            f"answer; see rushes logs {name} -f"
        )
        self.cluster, self.job = cluster, job


def find_run(name: str, address: str | None, folder: Path) -> ClusterRun | FolderRun:
    """`name`: a run of the cluster, a run in `folder`, or a run's own folder. Raises `ConfigError` listing the runs, or
    `NoController`."""
    for path in (local_run(name), folder / name):
        run = RunDir(path.resolve())
        if run.config.exists() and address is None and ("/" in name or not _runs_in_local_cluster(name)):
            return FolderRun(run)
    if client.find_address(address) is None:
        names = ", ".join(run.name for run in runs_in(folder)) or "none"
        raise ConfigError(f"no run {name!r} in {folder} (there: {names}), and no Ray cluster was found; give --address")
    cluster = client.open_cluster(address)
    running = cluster.running()
    if name not in running and (job := next(iter(cluster.jobs_of(name)), None)) is not None:
        if job.status not in TERMINAL:
            raise NoController(cluster, name, job)
        raise ConfigError(f"run {name!r} has ended ({job.status}, job {job.submission_id}); see rushes logs {name}")
    if name not in running:
        from jobs.cluster.run_api import unknown_run

        raise unknown_run(name, running)
    return ClusterRun(cluster, name)


def _runs_in_local_cluster(name: str) -> bool:
    """Whether the run is running in this machine's cluster, whose controller knows more than the files."""
    if client.find_address(None) is None:
        return False
    try:
        return name in client.open_cluster(None).running()
    except RushesError:
        return False


def runs_in(folder: Path) -> list[RunDir]:
    """The runs in a folder, by name."""
    if not folder.is_dir():
        return []
    return [RunDir(path) for path in sorted(folder.iterdir()) if (path / "config.yaml").exists()]
