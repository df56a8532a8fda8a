"""One optimiser update in the making: what the micro-batches replayed so far have left behind, beside the gradients.

The groups of a step may come one by one; loss and metrics are known with the last of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.core.types import GroupBatch
from pipeline.learner.distributed import DistributedContext

LOGGED = ("policy_loss", "kl", "clipped_low", "clipped_high")  # summed over a micro-batch


def pairs_of(groups: Sequence[GroupBatch]) -> int:
    """(take, trained step) pairs: what a loss is averaged over."""
    return sum(
        sum(takes for _, _, takes, _ in group.outline)
        if group.outline is not None
        else len(group.advantages) * len(group.held.parts[0].steps)
        for group in groups
    )


@dataclass
class GradientAccumulator:
    """`divisor`: the pairs that the gradients of its micro-batches are divided by; foretold from the first groups, as
    all groups have equally many. `checked`: places of groups whose replay is compared with the rollout's."""

    groups: int  # that it will have
    divisor: int
    checked: frozenset[int]
    done: int = 0  # groups replayed
    pairs: int = 0  # in them
    found: dict[Any, np.ndarray] = field(default_factory=dict)  # micro-batch -> [gap, LOGGED sums, ratios], this rank's
    sizes: list[int] = field(default_factory=list)  # of these rows, of all ranks (several ranks)

    @property
    def correction(self) -> float:
        """What the gradients are still to be multiplied by: 1 unless a group had more or fewer pairs than foretold."""
        return self.divisor / self.pairs

    def rows(self, ranks: DistributedContext) -> list[np.ndarray]:
        """Those of all ranks' micro-batches, in order."""
        return ranks.collect(self.found, self.sizes if ranks.world > 1 else None)

    def means(self, rows: Sequence[np.ndarray]) -> dict[str, float]:
        """`LOGGED`, per pair."""
        total: dict[str, float] = defaultdict(float)
        for row in rows:
            for name, value in zip(LOGGED, row[1:].tolist(), strict=False):
                total[name] += value / self.pairs
        return total
