"""`rushes watch`: the live view of `rushes train`, from anywhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common.command import Group, command
from jobs.common.options import DEFAULT_RUNS, Address, Debug, RunName, RunsFolder, make_console, say

if TYPE_CHECKING:
    from rich.console import Console

    from jobs.cluster.runs import ClusterRun, FolderRun


@command(Group.CLUSTER)
def watch(run: RunName, address: Address = None, dir_: RunsFolder = DEFAULT_RUNS, debug: Debug = False) -> None:
    """Follow a run in a live view until it ends.

    Waits for a run that is still starting. Ctrl-C leaves the view; the run continues.

    \b
    Example:
      rushes watch try --address http://127.0.0.1:8265
    """
    from jobs.common.progress import LiveView, make_view

    console = make_console()
    try:
        followed = _wait_for_run(run, address, dir_, console)
    except KeyboardInterrupt:
        return
    view = make_view(console, followed.name)
    if isinstance(view, LiveView):
        view.details = True
    try:
        for snapshot in followed.watch():
            view.update(snapshot)
    except KeyboardInterrupt:
        return
    finally:
        view.close()
    say(console, f"run {followed.name} has ended")


def _wait_for_run(name: str, address: str | None, folder: Path, console: Console) -> ClusterRun | FolderRun:
    """The run, once its controller answers."""
    from jobs.cluster import runs

    announced = False
    while True:
        try:
            return runs.find_run(name, address, folder)
        except runs.NoController as error:
            if not announced:
                say(console, str(error))
            announced = True
            time.sleep(runs.POLL_S)
