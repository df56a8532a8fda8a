"""`rushes logs`: what a run printed, or the log of all its workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import DEFAULT_RUNS, Address, Debug, RunName, RunsFolder

if TYPE_CHECKING:
    from jobs.cluster.client import Cluster


@command(Group.CLUSTER)
def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the run ends.")] = False,
    detail: Annotated[
        bool, typer.Option("--detail", help="run.log instead: the lines of all roles, while the run is running.")
    ] = False,
    address: Address = None,
    dir_: RunsFolder = DEFAULT_RUNS,
    debug: Debug = False,
) -> None:
    """Print a run's output, or with --detail its log.

    \b
    Examples:
      rushes logs try -f --address http://127.0.0.1:8265
      rushes logs try --detail
    """
    from jobs.cluster import client
    from jobs.cluster.runs import FolderRun, find_run

    if client.find_address(address) is not None:
        cluster = client.open_cluster(address)
        job = next(iter(cluster.jobs_of(run)), None)
        if job is not None and not detail:
            assert cluster.jobs is not None
            if follow:
                return _print_pieces(client.tail(cluster.jobs, job.submission_id))
            return _print_pieces([cluster.jobs.get_job_logs(job.submission_id)])
        if run in cluster.running():
            return _print_pieces(cluster.follow("follow_log", run) if follow else _whole_log(cluster, run))
        if address is not None:
            find_run(run, address, dir_)  # raises with the runs that exist
    local = find_run(run, None, dir_)
    if isinstance(local, FolderRun):
        _print_pieces(local.log(follow))


def _whole_log(cluster: Cluster, name: str) -> Iterator[str]:
    offset = 0
    while (part := cluster.call("log", name, offset=offset))["text"]:
        yield part["text"]
        offset = part["offset"]


def _print_pieces(pieces: Iterable[str]) -> None:
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass  # ends the reading, not the run
