"""One optimiser update in the making: what its micro-batches have left behind so far, beside their gradients.

The groups of a step may arrive one by one; loss and metrics are known with the last of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline.core.types import GroupBatch
from pipeline.learner.distributed import DistributedContext
from pipeline.rl.objectives.base import Loss, Objective


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How a micro-batch's statistics lie in one row of float64: the largest replay error (NaN: not compared), the sum
    of each logged value over its takes, over how many each was summed, and each spread value of every take.

    A value that is no term of the loss may be missing, or NaN for takes to which it does not apply."""

    logged: tuple[str, ...]
    spread: tuple[str, ...]
    terms: frozenset[str]  # of the logged values

    @classmethod
    def of(cls, objective: Objective, rewards: Iterable[str] = ()) -> RowLayout:
        """`rewards`: names of those that are computed in the learner, each of which is logged."""
        logged = (*objective.logged, *(f"reward/{name}" for name in rewards))
        return cls(logged, objective.spread, frozenset(objective.terms))

    def size(self, takes: int) -> int:
        return 1 + 2 * len(self.logged) + takes * len(self.spread)

    def row(self, loss: Loss) -> np.ndarray:
        """Float64 [size(b)]."""
        error = float("nan") if loss.replay_error is None else float(loss.replay_error.abs().max())
        sums, counts = [], []
        for name in self.logged:
            values = loss.logs[name] if name in self.terms else loss.logs.get(name, loss.total.new_zeros(0))
            present = values if name in self.terms else values[~values.isnan()]  # a loss that is NaN ends the run
            sums.append(float(present.sum()))
            counts.append(present.numel())
        spreads = [loss.spreads[name].cpu().numpy() for name in self.spread]
        return np.concatenate([[error, *sums, *counts], *spreads])

    def statistics(self, rows: Sequence[np.ndarray], pairs: int) -> UpdateStatistics:
        number = len(self.logged)
        totals = np.zeros(2 * number)
        for row in rows:
            totals += row[1 : 1 + 2 * number]
        counts = dict(zip(self.logged, totals[number:].tolist(), strict=True)) | dict.fromkeys(self.terms, pairs)
        means = {name: total / counts[name] for name, total in zip(self.logged, totals, strict=False) if counts[name]}
        spreads = {}
        for place, name in enumerate(self.spread):
            values = [np.split(row[1 + 2 * number :], len(self.spread))[place] for row in rows]
            spreads[name] = np.concatenate(values).astype(np.float32)
        errors = [float(row[0]) for row in rows if not np.isnan(row[0])]
        return UpdateStatistics(means, spreads, replay_error=max(errors, default=None))


def count_pairs(groups: Sequence[GroupBatch], unit: Literal["step", "trajectory", "tail"] = "step") -> int:
    """What a loss is averaged over: (take, trained step) pairs, or takes where the unit is all their steps."""
    return sum(
        sum(spec.takes for spec in group.micro_batches)
        if group.micro_batches is not None
        else sum((len(part.steps) if unit == "step" else 1) * (part.stop - part.start) for part in group.held.parts)
        for group in groups
    )


@dataclass(frozen=True, slots=True)
class UpdateStatistics:
    """Of a whole update."""

    means: dict[str, float]  # of the logged values, per (take, trained step) pair that has one; absent where none has
    spreads: dict[str, np.ndarray]  # float32, one value per pair
    replay_error: float | None  # the largest; None: nothing was compared


@dataclass
class GradientAccumulator:
    """The gradients themselves are in the parameters' `grad`, divided by `divisor`."""

    layout: RowLayout
    groups: int  # that the update will have
    divisor: int  # pairs of the whole update, expected from its first groups, as all have equally many
    checked: frozenset[int]  # positions of the groups whose replay is compared with the rollout at extra cost
    done: int = 0  # groups replayed
    pairs: int = 0  # in them
    stale: bool = False  # whether an earlier version of the policy drew some of them
    rows: dict[Any, np.ndarray] = field(default_factory=dict)  # of this process's micro-batches, see `RowLayout`
    row_sizes: list[int] = field(default_factory=list)  # of all ranks' micro-batches in order (several ranks only)

    @property
    def correction(self) -> float:
        """What the gradients must still be multiplied by: 1 unless a group had more or fewer pairs than expected."""
        return self.divisor / self.pairs

    def statistics(self, distributed: DistributedContext) -> UpdateStatistics:
        """Over the micro-batches of all ranks, the same on each."""
        rows = distributed.collect(self.rows, self.row_sizes if distributed.world > 1 else None)
        return self.layout.statistics(rows, self.pairs)
