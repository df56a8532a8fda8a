"""What a signal is: from the scores of a step's groups to what each group teaches the learner.

Runs in the controller, on a few numbers per take. Nothing here imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pipeline.config.parts import SIGNALS, Part
from pipeline.config.sections.rewards import RewardConfig
from pipeline.core.types import Feedback, GroupWork, RewardScores

if TYPE_CHECKING:
    from pipeline.config.schema import Config

register = SIGNALS.register
Scores = Mapping[str, RewardScores]  # of one group, by reward; of a group with labels, these alone as `LABEL`
LABEL = "given/label"  # no reward's name


def labels_of(work: GroupWork) -> Scores | None:
    """The labels of a group's takes in place of scores; None where rewards score them."""
    return {LABEL: RewardScores(values=np.array(work.labels, np.float32))} if work.labels else None


@dataclass(frozen=True, slots=True)
class SignalResult:
    """Of some groups of a step, in the order given."""

    feedback: list[Feedback]
    metrics: dict[str, float]


class Signal(Part, ABC):
    """Its fields are its options (`signal.*`); what it remembers of a run is in the state that `begin` makes."""

    gives: ClassVar[str]  # what an objective may require: advantages | pairs | none
    reads: ClassVar[frozenset[str]] = frozenset({"rewards"})  # what it orders takes by: rewards | labels of the data

    @abstractmethod
    def describe(self) -> str:
        """A sentence for the report: how several rewards are combined."""

    @property
    def drops_flat_groups(self) -> bool:
        """Whether groups that teach nothing are left out, and others admitted in their place."""
        return False

    @abstractmethod
    def begin(self, rewards: Mapping[str, RewardConfig]) -> SignalState:
        """For a run with these rewards, in the config's order."""

    def needs_whole_step(self, rewards: Mapping[str, RewardConfig]) -> bool:
        """Whether what a group teaches depends on the other groups of its step."""
        return any(reward.normalize != "none" for reward in rewards.values())

    def check(self, cfg: Config) -> None:
        """Rules of consistency that concern the signal. Raises `ConfigError` naming the key and the fix."""
        return None


class SignalState(ABC):
    """A signal at work in one run."""

    @abstractmethod
    def step(self, groups: Sequence[Scores]) -> SignalResult:
        """What a step's groups teach. May be called again before `commit`, with some groups replaced."""

    @abstractmethod
    def is_flat(self, group: Scores) -> bool:
        """Whether the group teaches nothing, since its takes have equal rewards."""

    def commit(self) -> None:
        """The groups of the last `step` have been trained."""
        return None

    def state(self) -> dict[str, list[float]]:
        """JSON-able, exact: for checkpoints."""
        return {}

    def load_state(self, state: Mapping[str, Sequence[float]] | None) -> None:
        """Restores `state()`. Raises `CheckpointError`."""
        return None
