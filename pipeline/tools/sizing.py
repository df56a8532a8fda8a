"""How many rollout workers and reward servers a learner can use: a model of one step's time, and a choice from it.

It is computed from times that are measured (`measured` reads them from a run's metrics) or given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SLACK = 0.05  # a step may take this share longer than with unlimited reward servers


@dataclass(frozen=True)
class Timings:
    """Seconds of work in one optimisation step with one worker of each kind."""

    groups: int  # groups per step
    rollout: float  # drawing all groups, on one rollout worker
    score: Mapping[str, float]  # reward -> scoring all groups, on one server
    learn: float  # the update
    sync: float = 0.0  # new weights out and confirmed


@dataclass(frozen=True)
class Sizing:
    """Numbers of workers, and the predicted step time and utilisation."""

    rollout: int
    reward: dict[str, int]
    step: float  # seconds
    rollout_busy: float  # share of the time that a rollout worker is busy
    learner_busy: float


def step_seconds(times: Timings, rollout: int, reward: Mapping[str, int], staleness: int) -> float:
    """Seconds of a step with `rollout` workers and `reward[name]` servers.

    staleness 0: the roles take turns. Workers draw whole groups in waves; scoring begins with the first finished group
    and ends after the last wave, or after the slowest reward has caught up; then comes the update.
    staleness s > 0: the roles overlap, so the busiest one decides; but one group's latency through all of them must fit
    into s + 1 steps, whatever the number of workers.
    """
    groups, group_s = times.groups, times.rollout / times.groups
    update = times.learn + times.sync
    if staleness:
        latency = group_s + max((s / groups for s in times.score.values()), default=0.0) + update
        busiest = max([times.rollout / rollout, update, *(s / reward[name] for name, s in times.score.items())])
        return max(busiest, latency / (staleness + 1))
    waves = math.ceil(groups / rollout)
    last_wave = groups - (waves - 1) * rollout
    ready = waves * group_s
    for name, seconds in times.score.items():
        each, servers = seconds / groups, reward[name]
        ready = max(
            ready,
            waves * group_s + math.ceil(last_wave / servers) * each,
            group_s + math.ceil(groups / servers) * each,
        )
    return ready + update


def size(times: Timings, rollout: int, staleness: int) -> Sizing:
    """`rollout` workers with the fewest reward servers that do not slow them down (by more than 5 %)."""
    max_servers = times.groups * (staleness + 1)
    reward = dict.fromkeys(times.score, max_servers)
    limit = step_seconds(times, rollout, reward, staleness) * (1 + SLACK)
    for name in reward:
        enough = (
            n for n in range(1, max_servers + 1) if step_seconds(times, rollout, reward | {name: n}, staleness) <= limit
        )
        reward[name] = next(enough)
    step = step_seconds(times, rollout, reward, staleness)
    return Sizing(
        rollout=rollout,
        reward=reward,
        step=step,
        rollout_busy=min(1.0, times.rollout / rollout / step) if step else 0.0,
        learner_busy=min(1.0, times.learn / step) if step else 0.0,
    )


def choices(times: Timings, staleness: int, max_rollout: int | None = None) -> list[Sizing]:
    """One sizing per useful number of rollout workers, ascending; numbers that save no time are left out.
    Workers beyond the number of groups that may be in flight never help."""
    limit = times.groups * (staleness + 1)
    rows: list[Sizing] = []
    for rollout in range(1, min(limit, max_rollout or limit) + 1):
        row = size(times, rollout, staleness)
        if not rows or row.step < rows[-1].step * (1 - 1e-3):
            rows.append(row)
    return rows


def choose(rows: Sequence[Sizing], worth: float) -> Sizing:
    """The last of `rows` to which each added rollout worker shortens the step by at least `worth` (0.05: 5 %)."""
    best = rows[0]
    for row in rows[1:]:
        if (best.step - row.step) / best.step >= worth * (row.rollout - best.rollout):
            best = row
    return best


def measured(
    records: Sequence[Mapping[str, float]], groups: int, rollout_workers: int, reward_workers: Mapping[str, int]
) -> Timings:
    """Medians over the steps of a run (metrics.jsonl), without the first if there are others: it is the warm-up.

    The metrics are seconds per worker, so they are multiplied by the number of workers at that step: what the record
    states (`workers/rollout`, `workers/reward.NAME`), else the given numbers. Raises ValueError without any step.
    """
    rows = [row for row in records if "time/rollout" in row]
    rows = rows[1:] if len(rows) > 2 else rows
    if not rows:
        raise ValueError("no finished step")

    def median(name: str, pool: str, workers: int) -> float:
        return statistics.median(row.get(name, 0.0) * row.get(f"workers/{pool}", workers) for row in rows)

    names = [name for name in reward_workers if any(f"time/score/{name}" in row for row in rows)]
    score = {name: median(f"time/score/{name}", f"reward.{name}", reward_workers[name]) for name in names}
    if not score and len(reward_workers) == 1:
        score = {name: median("time/score", f"reward.{name}", count) for name, count in reward_workers.items()}
    return Timings(
        groups=groups,
        rollout=median("time/rollout", "rollout", rollout_workers),
        score=score,
        learn=statistics.median(row.get("time/learn", 0.0) for row in rows),
        sync=statistics.median(row.get("time/sync", 0.0) for row in rows),
    )
