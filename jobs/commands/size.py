"""`rushes plan`: how many workers of each kind a run can use, from its measured step times or from given ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.resources import WorkerRange, total
from pipeline.core.errors import ConfigError, InputError
from pipeline.tools.sizing import Sizing, Timings, choices, choose, measured

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.config.schema import Config

_EXAMPLE = "such as --rollout 320 --score 40 --learn 90"


def from_run(folder: Path) -> tuple[Timings, Config]:
    """Raises `InputError` when the folder is no run, or one without a finished step."""
    from pipeline.config.load import load_config
    from pipeline.runs.tracking import read_metrics

    if not (folder / "config.yaml").exists():
        raise InputError(f"{folder}: is not a run folder (it has no config.yaml); give one, or timings {_EXAMPLE}")
    cfg = load_config(folder / "config.yaml")
    servers = {name: reward.workers.max for name, reward in cfg.rewards.items()}
    try:
        times = measured(read_metrics(folder), cfg.algorithm.groups_per_step, cfg.rollout.workers.max, servers)
    except ValueError:
        raise InputError(f"{folder}: has no finished step to measure yet; give timings {_EXAMPLE}") from None
    return times, cfg


def from_options(rollout: float | None, score: list[str], learn: float | None, sync: float, groups: int) -> Timings:
    """Of the command line's seconds. Raises `ConfigError`."""
    if rollout is None or learn is None:
        raise ConfigError(f"plan: give a run's folder, or seconds of one worker for all groups of a step, {_EXAMPLE}")
    scores: dict[str, float] = {}
    for text in score:
        name, mark, value = text.rpartition("=")
        try:
            scores[name if mark else "reward"] = _seconds(float(value))
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
    times: Timings, cfg: Config | None, staleness: int, most: int | None, worth: float, console: Console
) -> Sizing:
    """Prints the measured seconds, the table and the choice; the last line is config keys to copy."""
    from rich.table import Table

    rows = choices(times, staleness, most)
    best = choose(rows, worth)
    scores = "".join(f", score {name} {seconds:.2f}" for name, seconds in times.score.items())
    console.print(
        f"seconds a step with one worker of each kind: rollout {times.rollout:.2f}{scores}, learn {times.learn:.2f}, "
        f"sync {times.sync:.2f} ({times.groups} groups a step, max_staleness {staleness})",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    table = Table("", "rollout workers", "reward servers", "s a step", "speed-up", "rollouts busy", "learner busy")
    for row in rows:
        servers = ", ".join(f"{name} {count}" for name, count in row.reward.items()) or "-"
        table.add_row(
            "->" if row is best else "", str(row.rollout), servers, f"{row.step:.2f}", f"{rows[0].step / row.step:.2f}",
            f"{row.rollout_busy:.0%}", f"{row.learner_busy:.0%}",
        )  # fmt: skip
    console.print(table)
    if cfg is not None:
        needs = total(
            [
                (WorkerRange(cfg.learner.ranks, cfg.learner.ranks), cfg.learner.resources),
                (WorkerRange(best.rollout, best.rollout), cfg.rollout.resources),
                *((WorkerRange(n, n), cfg.rewards[name].resources) for name, n in best.reward.items()),
            ]
        )
        cpus, gpus = needs.get("CPU", 0.0), needs.get("GPU", 0.0)
        console.print(f"reserves {cpus:g} CPUs and {gpus:g} GPUs", highlight=False)
    keys = [f"rollout.workers={best.rollout}", *(f"rewards.{name}.workers={n}" for name, n in best.reward.items())]
    console.print(" ".join(keys), highlight=False, markup=False, soft_wrap=True)
    return best
