"""The verdict on a run: did the model get better, or was the reward hacked?

Each evaluation is compared with the one before training, on the same prompts and seeds. Suspect is what has changed
clearly (`LEVEL`, `LEAST`; paired over prompts) and for the worse: a reward that fell, a gold reward (weight 0: judged,
never trained on) that fell from the start or from its peak, a guard that left its tolerance. Without a suspect, the
weighted reward decides: beyond its 95 % interval it has improved, or the run is worse than its start; else nothing can
be said to have changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pipeline.config.schema import Config
from pipeline.core.statistics import Estimate, with_error
from pipeline.rewards.guards import GUARDS
from pipeline.rl.evaluation import Changes, changes

# Fall of a reward that counts, in standard deviations of its prompts' means: of many prompts, every trifle is clear.
LEAST = 0.1
LEVEL = 0.99  # of the interval that a suspect change must leave; divided among the evaluations a gold is compared with


Kind = Literal["improved", "worse", "same", "suspect"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """What has changed for the worse."""

    name: str  # of a reward or guard; "reward": the weighted sum of rewards
    kind: Literal["reward", "gold", "guard"]
    before: float
    after: float
    since: int = 0  # step of `before`

    def __str__(self) -> str:
        since = f" since step {self.since}" if self.since else ""
        return f"{self.name} ({self.before:.3g} → {self.after:.3g}{since})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """`kind`: improved; worse; same (no measurable change); suspect."""

    kind: Kind
    suspects: tuple[Suspect, ...]
    reward: Estimate | None  # change of the weighted reward

    @property
    def text(self) -> str:
        """One line, such as 'suspect: brightness (0.52 → 0.91)'."""
        gain = f"held-out reward {with_error(self.reward.mean, self.reward.ci95, sign='+')}" if self.reward else ""
        if self.kind == "suspect":
            return f"suspect: {', '.join(str(suspect) for suspect in self.suspects)}"
        if self.kind in ("improved", "worse"):
            return f"{self.kind} ({gain}, 95 % interval)"
        if self.reward is None or self.reward.ci95 is None:
            return "no measurable change (a single prompt has no error)"
        return f"no measurable change ({gain}, 95 % interval)"

    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, "text": self.text, "suspects": [asdict(suspect) for suspect in self.suspects]}


def tolerances(cfg: Config) -> dict[str, float]:
    """Guard -> its tolerance; those that are switched off are left out."""
    chosen = {name: guard.tolerance for name, guard in GUARDS.items()} | cfg.evaluation.guards
    return {name: tolerance for name, tolerance in chosen.items() if tolerance is not None}


def judge(
    records: Sequence[Mapping[str, Any]], weights: Mapping[str, float], allowed: Mapping[str, float]
) -> Verdict | None:
    """The verdict on the last of a run's evaluations (records in order); None on the first. `weights` of all rewards;
    `allowed`: `tolerances`."""
    if len(records) < 2:
        return None
    first, last = records[0], records[-1]
    change = changes(first, last)
    suspects = [
        *_fallen_rewards(first, last, change, weights),
        *_fallen_gold(records, weights),
        *_moved_guards(first, last, change, allowed),
    ]
    direction = None if change.reward is None else change.reward.direction()
    kind: Kind = "improved" if direction == "up" else "worse" if direction == "down" else "same"
    return Verdict(kind="suspect" if suspects else kind, suspects=tuple(suspects), reward=change.reward)


def _fallen_rewards(
    first: Mapping[str, Any], last: Mapping[str, Any], change: Changes, weights: Mapping[str, float]
) -> list[Suspect]:
    """The weighted sum, or one of several rewards that are trained on; with a negative weight, one that rose."""
    trained = [name for name, weight in weights.items() if weight and name in change.rewards]
    before = first["rewards"]
    worse = [name for name in trained if _falls(change.rewards[name], before[name], sign=np.sign(weights[name]))]
    found = [_suspect(name, "reward", before[name], last["rewards"][name]) for name in worse]
    if not found and change.reward is not None and _falls(change.reward, first):
        found = [_suspect("reward", "reward", first, last)]
    return found


def _fallen_gold(records: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> list[Suspect]:
    """Golds that have fallen from where they were highest before."""
    last, found = records[-1], []
    for name in (name for name, weight in weights.items() if weight == 0):
        earlier = [record for record in records[:-1] if name in (record.get("rewards") or {})]
        if not earlier or name not in (last.get("rewards") or {}):
            continue
        peak = max(earlier, key=lambda record: record["rewards"][name]["mean"])
        change = changes(peak, last).rewards.get(name)
        if change is not None and _falls(change, peak["rewards"][name], level=1 - (1 - LEVEL) / len(earlier)):
            found.append(_suspect(name, "gold", peak["rewards"][name], last["rewards"][name], peak["step"]))
    return found


def _falls(change: Estimate, before: Mapping[str, Any], level: float = LEVEL, sign: float = 1.0) -> bool:
    """Whether a reward fell clearly and far. `before`: the record it is counted from; `sign`: -1: less is better."""
    spread = np.std([mean for mean in before["prompt_means"] if mean is not None])
    worse = change.direction(level) == ("down" if sign > 0 else "up")
    return worse and abs(change.mean) >= LEAST * spread


def _moved_guards(
    first: Mapping[str, Any], last: Mapping[str, Any], change: Changes, allowed: Mapping[str, float]
) -> list[Suspect]:
    found = []
    for name, tolerance in allowed.items():
        after = (last.get("guards") or {}).get(name)
        if after is None:
            continue
        if GUARDS[name].kind == "limit":
            before, moved = {"mean": 0.0}, "up" if after["mean"] > tolerance else "same"
        elif name in change.guards:
            before, moved = first["guards"][name], change.guards[name].direction(LEVEL)
        else:
            continue
        low, high = GUARDS[name].allowed(before["mean"], tolerance)
        if (moved == "up" and after["mean"] > high) or (moved == "down" and after["mean"] < low):
            found.append(_suspect(name, "guard", before, after))
    return found


def _suspect(
    name: str,
    kind: Literal["reward", "gold", "guard"],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    since: int = 0,
) -> Suspect:
    return Suspect(name=name, kind=kind, before=before["mean"], after=after["mean"], since=since)
