"""`rushes scale`: sets the number of workers of a running run's pools."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Address, Debug, RunName, make_console, say
from pipeline.config.messages import show
from pipeline.core.errors import ConfigError, RunFailed

_TARGET = re.compile(r"(rollout|reward\.[^=]+)=(\d+)$")


@command(Group.CLUSTER)
def scale(
    run: RunName,
    targets: Annotated[list[str], typer.Argument(metavar="POOL=N", help="rollout=N or reward.NAME=N.")],
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Change the number of workers of a running run.

    \b
    Examples:
      rushes scale try rollout=8
      rushes scale try rollout=8 reward.clip=2 --address http://127.0.0.1:8265
    """
    from jobs.cluster import client
    from jobs.cluster.runs import FolderRun, find_run

    counts = parse_targets(targets)
    if "/" not in run:
        client.reachable(client.find_address(address))  # or the error would be about folders, which have no workers
    target = find_run(run, address, Path("/nonexistent"))
    if isinstance(target, FolderRun):
        raise RunFailed(f"run {run}: only a run in a cluster can be scaled")
    answer, console = target.cluster.call("scale", run, targets=counts), make_console()
    for pool, count in (answer if isinstance(answer, dict) else counts).items():
        say(console, f"{pool}: {count}")


def parse_targets(items: list[str]) -> dict[str, int]:
    """`rollout=8 reward.clip=2` -> {"rollout": 8, "reward.clip": 2}. Raises `ConfigError`."""
    targets = {}
    for item in items:
        match = _TARGET.match(item)
        if not match:
            raise ConfigError(f"scale: found {show(item)}; expected rollout=N or reward.NAME=N, such as rollout=8")
        targets[match.group(1)] = int(match.group(2))
    if not targets:
        raise ConfigError("scale: say how many workers of which pool, such as rollout=8 reward.clip=2")
    return targets
