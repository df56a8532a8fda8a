"""One optimiser update in the making: what its micro-batches have left behind so far, beside their gradients.

The groups of a step may arrive one by one; loss and metrics are known with the last of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.core.types import GroupBatch
from pipeline.learner.distributed import DistributedContext
from pipeline.learner.replica import MicroBatchLoss

_SUMS = ("policy_loss", "kl", "clipped_low", "clipped_high")
ROW_SIZE = 1 + len(_SUMS)  # and one ratio per take


def row_of(loss: MicroBatchLoss) -> np.ndarray:
    """A micro-batch's statistics, float64 [ROW_SIZE + b]: largest replay error, sums over the takes, ratios."""
    policy = loss.policy
    sums = [float(values.sum()) for values in (policy.loss.detach(), loss.kl, policy.clipped_low, policy.clipped_high)]
    return np.array([float(loss.replay_error.abs().max()), *sums, *policy.ratio.cpu().numpy()])


def count_pairs(groups: Sequence[GroupBatch]) -> int:
    """(take, trained step) pairs: what a loss is averaged over."""
    return sum(
        sum(spec.takes for spec in group.micro_batches)
        if group.micro_batches is not None
        else len(group.advantages) * len(group.held.parts[0].steps)
        for group in groups
    )


@dataclass(frozen=True, slots=True)
class UpdateStatistics:
    """Of a whole update; means are per (take, trained step) pair."""

    policy_loss: float
    kl: float
    clipped_low: float
    clipped_high: float
    replay_error: float  # the largest
    ratios: np.ndarray  # float32, one per pair


@dataclass
class GradientAccumulator:
    """The gradients themselves are in the parameters' `grad`, divided by `divisor`."""

    groups: int  # that the update will have
    divisor: int  # pairs of the whole update, expected from its first groups, as all have equally many
    checked: frozenset[int]  # positions of the groups whose replay is compared with the rollout at extra cost
    done: int = 0  # groups replayed
    pairs: int = 0  # in them
    rows: dict[Any, np.ndarray] = field(default_factory=dict)  # of this process's micro-batches, see `row_of`
    row_sizes: list[int] = field(default_factory=list)  # of all ranks' micro-batches in order (several ranks only)

    @property
    def correction(self) -> float:
        """What the gradients must still be multiplied by: 1 unless a group had more or fewer pairs than expected."""
        return self.divisor / self.pairs

    def statistics(self, distributed: DistributedContext) -> UpdateStatistics:
        """Over the micro-batches of all ranks, the same on each."""
        rows = distributed.collect(self.rows, self.row_sizes if distributed.world > 1 else None)
        means = dict.fromkeys(_SUMS, 0.0)
        for row in rows:
            for name, value in zip(_SUMS, row[1:].tolist(), strict=False):
                means[name] += value / self.pairs
        return UpdateStatistics(
            **means,
            replay_error=max(float(row[0]) for row in rows),
            ratios=np.concatenate([row[ROW_SIZE:].astype(np.float32) for row in rows]),
        )
