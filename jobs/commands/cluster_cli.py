"""The commands of a cluster's user: each parses its options here and does its work in a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.options import ConfigPath, Debug, Overrides, console
from pipeline.core.errors import ConfigError

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        "-a",
        help="http://HOST:8265 (the dashboard), or HOST:6379 on a machine of the cluster; default: RAY_ADDRESS, or the "
        "Ray of this machine.",
    ),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or its folder.")]
Folder = Annotated[Path, typer.Option("--dir", help="Folder of this machine's runs.")]


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with run.name.")] = False,
    resume_or_start: Annotated[
        bool,
        typer.Option("--resume-or-start", help="Go on with run.name if it is there, else start it (for retried jobs)."),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log and return the exit code.")] = True,
    working_dir: Annotated[Path, typer.Option("--working-dir", help="Folder to upload.")] = Path("."),
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Name or pattern not to upload; may be repeated.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train on a Ray cluster: uploads this folder, runs `rushes train` there, follows its log.

    Checks the config first. .git, .venv, runs, caches and what .gitignore names are not uploaded. Ctrl-C leaves the
    log; the run goes on. Exit status: that of the run (130 when it was stopped).

    \b
    Examples:
      rushes submit configs/quickstart.yaml run.dir=/data/runs --address http://127.0.0.1:8265
      rushes submit my.yaml run.name=try run.dir=/data/runs -a http://127.0.0.1:8265 --no-wait
      rushes submit my.yaml run.name=try run.dir=/data/runs -a http://127.0.0.1:8265 --resume
      rushes submit my.yaml run.name=try run.dir=/data/runs -a http://127.0.0.1:8265 --resume-or-start
    """
    from jobs.commands.submit import submit as run

    raise typer.Exit(
        run(
            config,
            overrides or [],
            address=address,
            working_dir=working_dir,
            exclude=exclude or [],
            resume=resume,
            or_start=resume_or_start,
            wait=wait,
            console=console(),
        )
    )


def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Name of a run, or its folder.")] = None,
    address: Address = None,
    dir_: Folder = Path("runs"),
    json_out: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """What a run does at the moment; without RUN, all that go on in the cluster.

    \b
    Examples:
      rushes status
      rushes status try --address http://127.0.0.1:8265
      rushes status runs/try --json
    """
    from jobs.commands.runs import status as show

    raise typer.Exit(show(run, address, dir_, json_out, console()))


def watch(run: RunName, address: Address = None, dir_: Folder = Path("runs"), debug: Debug = False) -> None:
    """A run at a glance, live, until it ends; Ctrl-C leaves the run alone.

    \b
    Example:
      rushes watch try --address http://127.0.0.1:8265
    """
    from jobs.commands.runs import watch as show

    raise typer.Exit(show(run, address, dir_, console()))


def list_(address: Address = None, dir_: Folder = Path("runs"), debug: Debug = False) -> None:
    """The runs of the cluster and of this machine, ended ones included.

    \b
    Examples:
      rushes list
      rushes list --address http://127.0.0.1:8265
    """
    from jobs.commands.runs import list_runs

    raise typer.Exit(list_runs(address, dir_, console()))


def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    detail: Annotated[
        bool, typer.Option("--detail", help="run.log: the lines of all roles, while the run goes on.")
    ] = False,
    address: Address = None,
    dir_: Folder = Path("runs"),
    debug: Debug = False,
) -> None:
    """What a run has printed, or (--detail) the log of all its workers.

    \b
    Examples:
      rushes logs try -f --address http://127.0.0.1:8265
      rushes logs try --detail
    """
    from jobs.commands.runs import logs as show

    raise typer.Exit(show(run, address, dir_, follow, detail, console()))


def stop(
    run: RunName,
    now: Annotated[bool, typer.Option("--now", help="At once; steps since the last checkpoint are lost.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")] = True,
    address: Address = None,
    dir_: Folder = Path("runs"),
    debug: Debug = False,
) -> None:
    """Stop a run after it has saved its last completed step; --resume goes on from there.

    \b
    Examples:
      rushes stop try --address http://127.0.0.1:8265
      rushes stop runs/try
    """
    from jobs.commands.runs import stop as run_stop

    raise typer.Exit(run_stop(run, address, dir_, now, wait, console()))


def scale(
    run: RunName,
    targets: Annotated[list[str], typer.Argument(metavar="POOL=N", help="rollout=N or reward.NAME=N.")],
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Change the number of workers of a run that goes on.

    \b
    Examples:
      rushes scale try rollout=8
      rushes scale try rollout=8 reward.clip=2 --address http://127.0.0.1:8265
    """
    from jobs.commands.runs import scale as run_scale

    raise typer.Exit(run_scale(run, targets, address, console()))


def plan(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run's folder, also of one that goes on.")
    ] = None,
    rollout: Annotated[
        float | None, typer.Option("--rollout", help="Instead of RUN: seconds to draw a step's groups on one worker.")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="NAME=SECONDS", help="Seconds to score them on one server; per reward."),
    ] = None,
    learn: Annotated[float | None, typer.Option("--learn", help="Seconds of the update.")] = None,
    sync: Annotated[float, typer.Option("--sync", help="Seconds to publish the weights.")] = 0.0,
    groups: Annotated[int, typer.Option("--groups", min=1, help="Groups per step; with RUN: its own.")] = 8,
    staleness: Annotated[
        int | None, typer.Option("--staleness", min=0, help="algorithm.max_staleness; default: the run's, else 0.")
    ] = None,
    most: Annotated[int | None, typer.Option("--max", min=1, help="Rollout workers you could have.")] = None,
    worth: Annotated[
        float, typer.Option("--worth", min=0.0, max=1.0, help="Share of a step that one more worker must save.")
    ] = 0.05,
    debug: Debug = False,
) -> None:
    """How many rollout workers and reward servers to use, from measured step times.

    \b
    Examples:
      rushes plan runs/try
      rushes plan runs/try --staleness 1 --max 8
      rushes plan --rollout 320 --score clip=40 --learn 90 --groups 8
    """
    from jobs.commands.size import from_options, from_run, show

    if run is not None and (rollout is not None or learn is not None or score):
        raise ConfigError("plan: give either a run or --rollout, --score and --learn, not both")
    from pipeline.runs.remote_sync import local_run

    times, cfg = (
        from_run(local_run(run)) if run is not None else (from_options(rollout, score or [], learn, sync, groups), None)
    )
    if staleness is None:
        staleness = cfg.algorithm.max_staleness if cfg is not None else 0
    show(times, cfg, staleness, most, worth, console())


def add_cluster_commands(app: typer.Typer) -> None:
    for command in (submit, status, watch, logs, stop, scale, plan):
        app.command()(command)
    app.command("list")(list_)
