"""`rushes status`, `list`, `logs`, `stop`, `scale`, `watch`: a run of a cluster by its name, or of this machine by its
folder."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cluster.client import TERMINAL, Cluster, find_address, open_cluster, reachable
from jobs.common.progress import LiveView, clock, eta_s, eval_line, health_line, make_view, step_line
from pipeline.core.errors import ConfigError, RunFailed, RushesError
from pipeline.runs.paths import RunDir, writer_of
from pipeline.runs.remote_sync import local_run

if TYPE_CHECKING:
    from rich.console import Console

POLL_S = 1.0
_TARGET = re.compile(r"(rollout|reward\.[^=]+)=(\d+)$")


# ------------------------------------------------------------------------------------------------- which run


class FolderRun:
    """A run seen through its files: one of this machine, or one that has ended."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    @property
    def name(self) -> str:
        return self.run.name

    def snapshot(self, since: int = -1) -> dict[str, Any]:
        """Like `Controller.progress`, as far as the files tell."""
        from pipeline.config.load import load_config
        from pipeline.runs.tracking import read_jsonl, read_metrics

        cfg = load_config(self.run.config)
        records = [row for row in read_metrics(self.run.path) if "reward/mean" in row]
        writer = writer_of(self.run)
        state = f"going on ({writer})" if writer else "finished" if self.run.finished else "stopped"
        return {
            "state": state,
            "step": int(records[-1]["step"]) if records else 0,
            "steps": cfg.run.steps,
            "records": records[since:],
            "recorded": len(records),
            "evals": read_jsonl(self.run.evals),
            "eval_progress": (0, 0),
            "roles": {},
            "queues": {},
        }

    def watch(self) -> Iterator[dict[str, Any]]:
        seen = 0
        while True:
            found = self.snapshot(seen)
            seen = found["recorded"]
            yield found
            if writer_of(self.run) is None:
                return
            time.sleep(POLL_S)

    def log(self, follow: bool) -> Iterator[str]:
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
        """SIGTERM to the process that writes the run, as Ctrl-C in its terminal; `now`: twice, which ends it at once.
        Raises `ConfigError` where there is none, or on another machine."""
        writer = writer_of(self.run)
        if writer is None:
            raise ConfigError(f"run {self.name} is not going on; nothing to stop")
        found = re.fullmatch(r"process (\d+) on (.+)", writer)
        if not found or found.group(2) != os.uname().nodename:
            raise ConfigError(f"run {self.name} is written by {writer}; stop it there, or give its cluster's --address")
        for _ in range(2 if now else 1):
            os.kill(int(found.group(1)), signal.SIGTERM)
            time.sleep(0.2)


class ClusterRun:
    """A run that goes on in a cluster."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name

    def snapshot(self, since: int = -1) -> dict[str, Any]:
        return self.cluster.call("snapshot", self.name, since=since)

    def watch(self) -> Iterator[dict[str, Any]]:
        return self.cluster.follow("watch", self.name)


class NoController(ConfigError):
    """The run's job is there, but nobody to ask: it is starting, or at its very end."""

    def __init__(self, cluster: Cluster, name: str, job: Any) -> None:
        super().__init__(
            f"run {name!r} is starting or ending (job {job.submission_id} is {job.status}), so it cannot be asked yet "
            f"or any more; see rushes logs {name} -f"
        )
        self.cluster, self.job = cluster, job


def find(name: str, address: str | None, folder: Path) -> ClusterRun | FolderRun:
    """`name`: a run of the cluster, a run in `folder`, or a run's own folder. Raises `ConfigError` listing the runs, or
    `NoController`."""
    for path in (local_run(name), folder / name):
        run = RunDir(path.resolve())
        if run.config.exists() and address is None and ("/" in name or _elsewhere(name) is None):
            return FolderRun(run)
    if find_address(address) is None:
        there = ", ".join(run.name for run in _folder_runs(folder)) or "none"
        raise ConfigError(f"no run {name!r} in {folder} (there: {there}), and no Ray cluster was found; give --address")
    cluster = open_cluster(address)
    known = cluster.running()
    if name not in known and (job := next(iter(cluster.jobs_of(name)), None)) is not None:
        if job.status not in TERMINAL:
            raise NoController(cluster, name, job)
        raise ConfigError(f"run {name!r} has ended ({job.status}, job {job.submission_id}); see rushes logs {name}")
    if name not in known:
        from jobs.cluster.run_api import unknown_run

        raise unknown_run(name, known)
    return ClusterRun(cluster, name)


def _elsewhere(name: str) -> Cluster | None:
    """The cluster of this machine, if the run goes on in it: it knows more than the files."""
    if find_address(None) is None:
        return None
    try:
        cluster = open_cluster(None)
        return cluster if name in cluster.running() else None
    except RushesError:
        return None


def _folder_runs(folder: Path) -> list[RunDir]:
    if not folder.is_dir():
        return []
    return [RunDir(path) for path in sorted(folder.iterdir()) if (path / "config.yaml").exists()]


# ------------------------------------------------------------------------------------------------- the commands


def status(name: str | None, address: str | None, folder: Path, as_json: bool, console: Console) -> int:
    """One run in some lines; without a name, a line per run that goes on."""
    import json

    if name is None:
        rows = open_cluster(address).call("overview")
        if as_json:
            print(json.dumps(rows))
        for row in [] if as_json else rows:
            at = "" if row["step"] is None else f"  step {row['step']} of {row['steps']}"
            reward = "" if row["reward"] is None else f"  reward {row['reward']:.4f}"
            _say(console, f"{row['run']}  {row['state']}{at}{reward}")
        if not rows and not as_json:
            _say(console, "no run is going on in this cluster")
        return 0
    try:
        snapshot = find(name, address, folder).snapshot(-20)
    except NoController as nobody:
        job = nobody.job.submission_id
        _say(console, json.dumps({"state": "starting or ending", "job": job}) if as_json else str(nobody))
        return 0
    if as_json:
        print(json.dumps(snapshot))
        return 0
    records, steps = snapshot["records"], snapshot["steps"]
    _say(
        console, f"{name}  {snapshot['state']}, step {snapshot['step']} of {steps}, ETA {clock(eta_s(records, steps))}"
    )
    if records:
        _say(console, step_line(records[-1], records, steps))
        _say(console, health_line(records[-1], snapshot["queues"]))
    for record in snapshot["evals"][-2:]:
        _say(console, eval_line(record))
    for role, doing in snapshot["roles"].items():
        _say(console, f"  {role:<20} {doing}")
    return 0


def watch(name: str, address: str | None, folder: Path, console: Console) -> int:
    """The live view of `rushes train`, from anywhere; Ctrl-C leaves it without touching the run."""
    try:
        run = _once_it_answers(name, address, folder, console)
    except KeyboardInterrupt:
        return 0
    view = make_view(console, run.name)
    if isinstance(view, LiveView):
        view.details = True
    try:
        for snapshot in run.watch():
            view.update(snapshot)
    except KeyboardInterrupt:
        return 0
    finally:
        view.close()
    _say(console, f"run {run.name} has ended")
    return 0


def _once_it_answers(name: str, address: str | None, folder: Path, console: Console) -> ClusterRun | FolderRun:
    """Waits for a run that is starting."""
    said = False
    while True:
        try:
            return find(name, address, folder)
        except NoController as nobody:
            if not said:
                _say(console, str(nobody))
            said = True
            time.sleep(POLL_S)


def list_runs(address: str | None, folder: Path, console: Console) -> int:
    """Runs of the cluster, if there is one, and those in `folder`."""
    from rich.table import Table

    table = Table("run", "where", "state", "step", "held-out reward", "started")
    rows: list[tuple[str, ...]] = []
    if find_address(address) is not None:
        rows += _cluster_rows(open_cluster(address))
    named = {row[0] for row in rows}
    for run in _folder_runs(folder):
        if run.name not in named:
            found = FolderRun(run).snapshot()
            evals = found["evals"]
            reward = f"{evals[0]['mean']:.3f} -> {evals[-1]['mean']:.3f}" if evals else "-"
            begun = f"{datetime.fromtimestamp(run.config.stat().st_mtime):%Y-%m-%d %H:%M}"
            step = f"{found['step']}/{found['steps']}"
            rows.append((run.name, str(folder), found["state"], step, reward, begun))
    if not rows and find_address(address) is None and not folder.is_dir():
        raise ConfigError(f"no Ray cluster was found and there is no folder {folder}; give --address or --dir")
    for row in rows:
        table.add_row(*row)
    console.print(table if rows else "no runs", highlight=False)
    return 0


def _cluster_rows(cluster: Cluster) -> Iterator[tuple[str, ...]]:
    live = {row["run"]: row for row in cluster.call("overview")}
    for job in cluster.jobs_of():
        name = job.metadata["rushes_run"]
        begun = f"{datetime.fromtimestamp((job.start_time or 0) / 1000):%Y-%m-%d %H:%M}"
        row = live.pop(name, None) if job.status not in TERMINAL else None
        state = row["state"] if row else str(job.status.value).lower()
        yield name, f"job {job.submission_id}", state, _step(row), "-", begun
    for name, row in live.items():
        yield name, cluster.address, row["state"], _step(row), "-", "-"


def _step(row: dict[str, Any] | None) -> str:
    return f"{row['step']}/{row['steps']}" if row and row["step"] is not None else "-"


def logs(name: str, address: str | None, folder: Path, follow: bool, detail: bool, console: Console) -> int:
    """What `rushes train` printed, or (detail) run.log with the lines of all roles."""
    from jobs.cluster.client import tail

    if find_address(address) is not None:
        cluster = open_cluster(address)
        job = next(iter(cluster.jobs_of(name)), None)
        if job is not None and not detail:
            assert cluster.jobs is not None
            pieces = tail(cluster.jobs, job.submission_id) if follow else [cluster.jobs.get_job_logs(job.submission_id)]
            return _print(pieces)
        if name in cluster.running():
            if follow:
                return _print(cluster.follow("follow_log", name))
            return _print(_whole_log(cluster, name))
        if address is not None:
            find(name, address, folder)  # says what there is
    run = find(name, None, folder)
    if isinstance(run, FolderRun):
        return _print(run.log(follow))
    return 0


def _whole_log(cluster: Cluster, name: str) -> Iterator[str]:
    offset = 0
    while (found := cluster.call("log", name, offset=offset))["text"]:
        yield found["text"]
        offset = found["offset"]


def _print(pieces: Any) -> int:
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass  # only the reading ends
    return 0


def stop(name: str, address: str | None, folder: Path, now: bool, wait: bool, console: Console) -> int:
    """Saves a checkpoint and ends the run; `now`: ends it at once, the steps since the last checkpoint are lost."""
    try:
        run = find(name, address, folder)
    except NoController as nobody:  # its driver knows what to do with the signal that this sends
        assert nobody.cluster.jobs is not None
        nobody.cluster.jobs.stop_job(nobody.job.submission_id)
        _until_ended(nobody.cluster, nobody.job, wait)
    else:
        if isinstance(run, FolderRun):
            run.stop(now)
            while wait and writer_of(run.run) is not None:
                time.sleep(POLL_S)
        else:
            _stop_in_cluster(run, now, wait)
    _say(console, f"run {name} has ended" if wait else f"run {name} was asked to stop")
    return 0


def _stop_in_cluster(run: ClusterRun, now: bool, wait: bool) -> None:
    cluster = run.cluster
    job = next((job for job in cluster.jobs_of(run.name) if job.status not in TERMINAL), None)
    if now:
        if job is not None and cluster.jobs is not None:
            cluster.jobs.stop_job(job.submission_id)  # so that Ray calls it stopped, not failed
        cluster.call("kill", run.name)  # the driver sees its controller go, and ends
    else:
        cluster.call("stop", run.name)
    if job is not None:
        _until_ended(cluster, job, wait)
        return
    while wait and run.name in cluster.running():
        time.sleep(POLL_S)


def _until_ended(cluster: Cluster, job: Any, wait: bool) -> None:
    assert cluster.jobs is not None  # the job was found through it
    while wait and cluster.jobs.get_job_status(job.submission_id) not in TERMINAL:
        time.sleep(POLL_S)


def parse_targets(items: list[str]) -> dict[str, int]:
    """`rollout=8 reward.clip=2` -> {"rollout": 8, "reward.clip": 2}. Raises `ConfigError`."""
    targets = {}
    for item in items:
        found = _TARGET.match(item)
        if not found:
            raise ConfigError(f"scale: found {item!r}; expected rollout=N or reward.NAME=N, such as rollout=8")
        targets[found.group(1)] = int(found.group(2))
    if not targets:
        raise ConfigError("scale: say how many workers of which pool, such as rollout=8 reward.clip=2")
    return targets


def scale(name: str, items: list[str], address: str | None, console: Console) -> int:
    """Sets how many workers the pools of a run shall have."""
    targets = parse_targets(items)
    if "/" not in name:
        reachable(find_address(address))  # else the answer would be about folders, which have no workers
    run = find(name, address, Path("/nonexistent"))
    if isinstance(run, FolderRun):
        raise RunFailed(f"run {name}: only a run in a cluster can be scaled")
    answer = run.cluster.call("scale", name, targets=targets)
    for pool, count in (answer if isinstance(answer, dict) else targets).items():
        _say(console, f"{pool}: {count}")
    return 0


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
