"""`rushes status`: a run in a few lines, or a line per running run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import DEFAULT_RUNS, Address, Debug, RunsFolder, make_console, say


@command(Group.CLUSTER)
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Name of a run, or its folder.")] = None,
    address: Address = None,
    dir_: RunsFolder = DEFAULT_RUNS,
    json_out: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a run is doing; without RUN, all running ones.

    \b
    Examples:
      rushes status
      rushes status try --address http://127.0.0.1:8265
      rushes status runs/try --json
    """
    if run is None:
        _all_runs(address, json_out)
    else:
        _one_run(run, address, dir_, json_out)


def _all_runs(address: str | None, json_out: bool) -> None:
    import json

    from jobs.cluster import client

    rows, console = client.open_cluster(address).call("overview"), make_console()
    if json_out:
        print(json.dumps(rows))
        return
    for row in rows:
        at = "" if row["step"] is None else f"  step {row['step']} of {row['steps']}"
        reward = "" if row["reward"] is None else f"  reward {row['reward']:.4f}"
        say(console, f"{row['run']}  {row['state']}{at}{reward}")
    if not rows:
        say(console, "no run is running in this cluster")


def _one_run(name: str, address: str | None, folder: Path, json_out: bool) -> None:
    import json

    from jobs.cluster.runs import NoController, find_run
    from jobs.common.progress import clock, eta_s, eval_line, health_line, step_line

    console = make_console()
    try:
        snapshot = find_run(name, address, folder).snapshot(-20)
    except NoController as error:
        job = error.job.submission_id
        say(console, json.dumps({"state": "starting or ending", "job": job}) if json_out else str(error))
        return
    if json_out:
        print(json.dumps(snapshot.to_dict()))
        return
    records, steps = snapshot.records, snapshot.steps
    say(console, f"{name}  {snapshot.state}, step {snapshot.step} of {steps}, ETA {clock(eta_s(records, steps))}")
    if records:
        say(console, step_line(records[-1], records, steps))
        say(console, health_line(records[-1], snapshot.queues))
    for record in snapshot.evals[-2:]:
        say(console, eval_line(record))
    for name, activity in snapshot.activities.items():
        say(console, f"  {name:<20} {activity}")
