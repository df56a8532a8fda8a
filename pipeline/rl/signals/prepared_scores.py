"""The scores of a step's groups, prepared for a signal: routing, normalisation, clipping.

    scores that apply -> normalised (rewards.*.normalize) -> clipped (rewards.*.clip)

A prompt names the rewards that apply to it (`pipeline.rewards.routing`). The running statistics change once per step,
when the step has been trained, so that a resumed run has those of the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.config.sections.rewards import RewardConfig
from pipeline.core.errors import CheckpointError
from pipeline.core.types import RewardScores
from pipeline.rl.signals.base import SignalState


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and spread of all takes that a reward has scored so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def joined(self, values: np.ndarray) -> Moments:
        """With further values (Chan et al. 1983: exact and stable, unlike sums of squares)."""
        values = np.asarray(values, np.float64)
        count = self.count + values.size
        shift = float(values.mean()) - self.mean
        squares = float(((values - values.mean()) ** 2).sum())
        return Moments(
            count,
            self.mean + shift * values.size / count,
            self.squares + squares + shift**2 * self.count * values.size / count,
        )

    @property
    def std(self) -> float:
        """Population std; 1 where all values are equal, which leaves nothing to divide by."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > 1e-6 * max(1.0, abs(self.mean)) else 1.0


@dataclass(frozen=True, slots=True)
class PreparedScores:
    """Per group, in the order given: reward -> [K], only of the rewards that apply to its prompt."""

    raw: list[dict[str, np.ndarray]]  # as scored
    prepared: list[dict[str, np.ndarray]]  # normalised and clipped
    variances: list[dict[str, np.ndarray]]  # of repeated scorings, in the units of `prepared`
    metrics: dict[str, float]
    running: dict[str, Moments] = field(default_factory=dict)  # once these groups are trained


class ScorePreparation:
    """Keeps the running statistics of `rewards`, which are the config's, in order."""

    def __init__(self, rewards: Mapping[str, RewardConfig]) -> None:
        self.rewards = rewards
        self._running: dict[str, Moments] = {}

    def prepare(self, groups: Sequence[Mapping[str, RewardScores]]) -> PreparedScores:
        present = [
            {name: group[name] for name in self.rewards if not np.isnan(group[name].values).all()} for group in groups
        ]
        raw = [{name: scores.values for name, scores in group.items()} for group in present]
        prepared = [dict(group) for group in raw]
        variances: list[dict[str, np.ndarray]] = [
            {name: scores.variance for name, scores in group.items() if scores.variance is not None}
            for group in present
        ]
        running = dict(self._running)
        metrics: dict[str, float] = {}
        for name, reward in self.rewards.items():
            applies = [i for i, group in enumerate(raw) if name in group]
            if not applies or (reward.normalize == "none" and reward.clip is None):
                continue
            values = np.concatenate([raw[i][name] for i in applies])
            mean, std = 0.0, 1.0
            if reward.normalize != "none":
                moments = (running.get(name, Moments()) if reward.normalize == "running" else Moments()).joined(values)
                if reward.normalize == "running":
                    running[name] = moments
                mean, std = moments.mean, moments.std
                metrics |= {f"combine/mean/{name}": mean, f"combine/std/{name}": std}
            low, high = reward.clip or (-math.inf, math.inf)
            for i in applies:
                prepared[i][name] = np.clip((raw[i][name].astype(np.float64) - mean) / std, low, high)
                if name in variances[i]:
                    variances[i][name] = variances[i][name] / std**2
            if reward.clip is not None:
                scaled = (values - mean) / std
                metrics[f"combine/clipped/{name}"] = float(np.mean((scaled < low) | (scaled > high)))
        return PreparedScores(raw, prepared, variances, metrics, running)

    def commit(self, scores: PreparedScores) -> None:
        """Adds `scores` to the running statistics, once their step has been trained."""
        self._running = scores.running

    def state(self) -> dict[str, list[float]]:
        """JSON-able, exact."""
        return {name: [m.count, m.mean, m.squares] for name, m in self._running.items()}

    def load_state(self, state: Mapping[str, Sequence[float]] | None) -> None:
        """Statistics of rewards that are no longer in the config are dropped. Raises `CheckpointError`."""
        try:
            running = {name: Moments(int(c), float(m), float(s)) for name, (c, m, s) in (state or {}).items()}
        except (TypeError, ValueError, AttributeError):
            raise CheckpointError("the checkpoint's running reward statistics cannot be read") from None
        self._running = {name: moments for name, moments in running.items() if name in self.rewards}


class PreparedState(SignalState):
    """A signal at work on prepared scores, whose running statistics are what it remembers. `step` sets `_last`."""

    def __init__(self, rewards: Mapping[str, RewardConfig]) -> None:
        self._weights = {name: reward.weight for name, reward in rewards.items()}
        self._preparation = ScorePreparation(rewards)
        self._last: PreparedScores | None = None

    def commit(self) -> None:
        if self._last is not None:
            self._preparation.commit(self._last)

    def state(self) -> dict[str, list[float]]:
        return self._preparation.state()

    def load_state(self, state: Mapping[str, Sequence[float]] | None) -> None:
        self._preparation.load_state(state)
        self._last = None
