"""`rushes size`: how many workers of each kind a run can use, from its measured step times or from given ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, make_console, say
from pipeline.core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.config.schema import Config
    from pipeline.tools.sizing import Sizing, Timings

_EXAMPLE = "such as --rollout 320 --score 40 --learn 90"


@command(Group.LOOK)
def size(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run's folder; the run need not have ended.")
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
        int | None, typer.Option("--staleness", min=0, help="step.max_staleness; default: the run's, else 0.")
    ] = None,
    max_workers: Annotated[int | None, typer.Option("--max", min=1, help="Rollout workers you could have.")] = None,
    worth: Annotated[
        float, typer.Option("--worth", min=0.0, max=1.0, help="Share of a step that one more worker must save.")
    ] = 0.05,
    debug: Debug = False,
) -> None:
    """Choose numbers of workers from measured step times.

    Prints the step time for each number of rollout workers and reward servers, the best choice, and its config keys.

    \b
    Examples:
      rushes size runs/try
      rushes size runs/try --staleness 1 --max 8
      rushes size --rollout 320 --score clip=40 --learn 90 --groups 8
    """
    if run is not None and (rollout is not None or learn is not None or score):
        raise ConfigError("size: give either a run or --rollout, --score and --learn, not both")
    cfg = None
    if run is not None:
        from pipeline.runs.remote_sync import local_run

        times, cfg = from_run(local_run(run))
    else:
        times = from_options(rollout, score or [], learn, sync, groups)
    if staleness is None:
        staleness = cfg.step.max_staleness if cfg is not None else 0
    show(times, cfg, staleness, max_workers, worth, make_console())


def from_run(folder: Path) -> tuple[Timings, Config]:
    """Raises `InputError` when the folder is no run, or one without a finished step."""
    from pipeline.config.load import load_config
    from pipeline.runs.tracking import read_metrics
    from pipeline.tools.sizing import measured

    if not (folder / "config.yaml").exists():
        raise InputError(f"{folder}: is not a run folder (it has no config.yaml); give one, or timings {_EXAMPLE}")
    cfg = load_config(folder / "config.yaml")
    servers = {name: reward.workers.max for name, reward in cfg.rewards.items()}
    try:
        times = measured(read_metrics(folder), cfg.step.groups, cfg.rollout.workers.max, servers)
    except ValueError:
        raise InputError(f"{folder}: has no finished step to measure yet; give timings {_EXAMPLE}") from None
    return times, cfg


def from_options(rollout: float | None, score: list[str], learn: float | None, sync: float, groups: int) -> Timings:
    """Timings from the seconds on the command line. Raises `ConfigError`."""
    from pipeline.tools.sizing import Timings

    if rollout is None or learn is None:
        raise ConfigError(f"size: give a run's folder, or seconds of one worker for all groups of a step, {_EXAMPLE}")
    scores: dict[str, float] = {}
    for text in score:
        name, separator, value = text.rpartition("=")
        try:
            scores[name if separator else "reward"] = _seconds(float(value))
        except ValueError:
            raise ConfigError(
                f"--score {text}: expected seconds or NAME=SECONDS, such as --score 40 or --score clip=40"
            ) from None
    for option, seconds in (("--rollout", rollout), ("--learn", learn), ("--sync", sync)):
        try:
            _seconds(seconds)
        except ValueError:
            raise ConfigError(f"{option} {seconds:g}: expected seconds, 0 or more") from None
    if rollout + learn == 0:
        raise ConfigError("--rollout 0 --learn 0: there is nothing to divide among workers; give measured seconds")
    return Timings(groups=groups, rollout=rollout, score=scores, learn=learn, sync=sync)


def _seconds(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError
    return value


def show(
    times: Timings, cfg: Config | None, staleness: int, max_workers: int | None, worth: float, console: Console
) -> Sizing:
    """Prints the measured seconds, the table and the choice; the last line is config keys to copy."""
    from rich.table import Table

    from pipeline.config.resources import WorkerRange, total_resources
    from pipeline.tools.sizing import choices, choose

    rows = choices(times, staleness, max_workers)
    best = choose(rows, worth)
    scores = "".join(f", score {name} {seconds:.2f}" for name, seconds in times.score.items())
    say(
        console,
        f"seconds a step with one worker of each kind: rollout {times.rollout:.2f}{scores}, learn {times.learn:.2f}, "
        f"sync {times.sync:.2f} ({times.groups} groups a step, max_staleness {staleness})",
    )
    table = Table("", "rollout workers", "reward servers", "s a step", "speed-up", "rollouts busy", "learner busy")
    for row in rows:
        servers = ", ".join(f"{name} {count}" for name, count in row.reward.items()) or "-"
        table.add_row(
            "->" if row is best else "", str(row.rollout), servers, f"{row.step:.2f}", f"{rows[0].step / row.step:.2f}",
            f"{row.rollout_busy:.0%}", f"{row.learner_busy:.0%}",
        )  # fmt: skip
    console.print(table)
    if cfg is not None:
        needs = total_resources(
            [
                (WorkerRange(cfg.learner.ranks, cfg.learner.ranks), cfg.learner.resources),
                (WorkerRange(best.rollout, best.rollout), cfg.rollout.resources),
                *((WorkerRange(n, n), cfg.rewards[name].resources) for name, n in best.reward.items()),
            ]
        )
        cpus, gpus = needs.get("CPU", 0.0), needs.get("GPU", 0.0)
        say(console, f"reserves {cpus:g} CPUs and {gpus:g} GPUs")
    keys = [f"rollout.workers={best.rollout}", *(f"rewards.{name}.workers={n}" for name, n in best.reward.items())]
    say(console, " ".join(keys))
    return best
