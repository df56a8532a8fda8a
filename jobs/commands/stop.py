"""`rushes stop`: ends a run, by default after a checkpoint of its last completed step."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import DEFAULT_RUNS, Address, Debug, RunName, RunsFolder, make_console, say


@command(Group.CLUSTER)
def stop(
    run: RunName,
    now: Annotated[bool, typer.Option("--now", help="At once; steps since the last checkpoint are lost.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")] = True,
    address: Address = None,
    dir_: RunsFolder = DEFAULT_RUNS,
    debug: Debug = False,
) -> None:
    """Save a run's last completed step and stop it.

    rushes train --resume continues from there.

    \b
    Examples:
      rushes stop try --address http://127.0.0.1:8265
      rushes stop runs/try
    """
    from jobs.cluster import runs
    from pipeline.runs.lock import writer_of

    try:
        target = runs.find_run(run, address, dir_)
    except runs.NoController as error:
        assert error.cluster.jobs is not None
        error.cluster.jobs.stop_job(error.job.submission_id)  # its driver handles the SIGTERM that this sends
        if wait:
            runs.wait_for_end(error.cluster, error.job)
    else:
        if isinstance(target, runs.FolderRun):
            target.stop(now)
            while wait and writer_of(target.run) is not None:
                time.sleep(runs.POLL_S)
        else:
            target.stop(now, wait)
    say(make_console(), f"run {run} has ended" if wait else f"run {run} was asked to stop")
