"""`rushes list`: the runs of a cluster, if there is one, and those of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jobs.common.command import Group, command
from jobs.common.options import DEFAULT_RUNS, Address, Debug, RunsFolder, make_console
from pipeline.core.errors import ConfigError, RushesError, one_line
from pipeline.core.reading import storable

if TYPE_CHECKING:
    from jobs.cluster.client import Cluster
    from jobs.cluster.runs import FolderRun


@command(Group.CLUSTER, name="list")
def list_runs(address: Address = None, dir_: RunsFolder = DEFAULT_RUNS, debug: Debug = False) -> None:
    """List the runs of a cluster and of this machine.

    Runs that have ended are included.

    \b
    Examples:
      rushes list
      rushes list --address http://127.0.0.1:8265
    """
    from rich.table import Table

    from jobs.cluster import client
    from jobs.cluster.runs import FolderRun, runs_in

    table = Table("run", "where", "state", "step", "held-out reward", "started")
    rows: list[tuple[str, ...]] = []
    in_cluster = client.find_address(address) is not None
    if in_cluster:
        rows += _cluster_rows(client.open_cluster(address))
    listed = {row[0] for row in rows}
    for run in runs_in(dir_):
        if run.name not in listed:
            rows.append((storable(run.name), storable(str(dir_)), *_folder_row(FolderRun(run))))
    if not rows and not in_cluster and not dir_.is_dir():
        raise ConfigError(f"no Ray cluster was found and there is no folder {dir_}; give --address or --dir")
    for row in rows:
        table.add_row(*row)
    make_console().print(table if rows else "no runs", highlight=False)


def _folder_row(run: FolderRun) -> tuple[str, str, str, str]:
    """State, step, held-out reward, start. A folder that cannot be read has its error as state: the other runs are
    listed all the same."""
    try:
        started = _minute(run.run.config.stat().st_mtime)
        snapshot = run.snapshot()
    except (RushesError, OSError) as error:
        return f"unreadable: {one_line(error)}", "-", "-", "-"
    evals = snapshot.evals
    reward = f"{evals[0]['mean']:.3f} -> {evals[-1]['mean']:.3f}" if evals else "-"
    return snapshot.state, f"{snapshot.step}/{snapshot.steps}", reward, started


def _minute(time_s: float) -> str:
    try:
        return f"{datetime.fromtimestamp(time_s):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError, OSError):  # a file's date may be anything
        return "-"


def _cluster_rows(cluster: Cluster) -> Iterator[tuple[str, ...]]:
    from jobs.cluster.client import RUN_KEY, TERMINAL

    running = {row["run"]: row for row in cluster.call("overview")}
    for job in cluster.jobs_of():
        name = job.metadata[RUN_KEY]
        started = f"{datetime.fromtimestamp((job.start_time or 0) / 1000):%Y-%m-%d %H:%M}"
        row = running.pop(name, None) if job.status not in TERMINAL else None
        state = row["state"] if row else str(job.status.value).lower()
        yield name, f"job {job.submission_id}", state, _step_text(row), "-", started
    for name, row in running.items():
        yield name, cluster.address, row["state"], _step_text(row), "-", "-"


def _step_text(row: dict[str, Any] | None) -> str:
    return f"{row['step']}/{row['steps']}" if row and row["step"] is not None else "-"
