"""The life cycle of groups as a pure state machine: no Ray, no torch, no clock.

    queued ──► running ──► scored ──► trained
       ▲          │           │ ├───► filtered          (no learning signal, slot given back)
       └──────────┼───────────┘                         (its trajectory was lost)
                  └──► failed(reason)                   (attempts used up, slot given back)

What happens to a group while it runs (rollout, scoring, retries) is recorded in `actors.group_run.GroupRun`.

Steps are numbered from 0; step s turns learner version s into s + 1. Group ids rise in admission order, and the
batch of a step is its first `groups_per_step` unfiltered groups in id order, so it does not depend on timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

QUEUED, RUNNING, SCORED = "queued", "running", "scored"
TRAINED, FILTERED, FAILED = "trained", "filtered", "failed"
ACTIVE = (QUEUED, RUNNING, SCORED)
ENDS = (TRAINED, FILTERED, FAILED)


class LedgerError(RuntimeError):
    """A transition that the life cycle does not allow: a bug of the caller, never the user's."""


@dataclass(slots=True)
class Group:
    """One admitted group. Ended groups are kept as counts only."""

    id: int
    step: int  # the optimisation step that will consume it
    prompt: int  # row in the prompt set
    position: int = 0  # among the groups admitted to its step
    state: str = QUEUED
    version: int | None = None  # policy version of the current or last rollout


class Ledger:
    """Accounts for every group of a run. All methods raise `LedgerError` on an illegal transition."""

    def __init__(
        self,
        *,
        groups_per_step: int,
        max_staleness: int,
        max_failed_groups: int,
        steps: int,
        slots: int | None = None,
    ) -> None:
        """`slots`: groups that may be active at once (default: those of max_staleness + 1 steps)."""
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.max_failed_groups = max_failed_groups
        self.steps = steps
        self.slots = slots if slots is not None else groups_per_step * (max_staleness + 1)
        if self.slots < groups_per_step:
            raise ValueError(f"slots {self.slots} cannot hold one step of {groups_per_step} groups")
        self.groups: dict[int, Group] = {}  # active ones
        # The same by step, so that nothing done per group walks over all active ones.
        self._active_by_step: dict[int, dict[int, Group]] = {}  # step -> id -> group, in rising order of ids
        self._admitted_by_step: dict[int, int] = {}  # step -> groups admitted to it so far
        self.next_id = 0
        self.step = 0  # the step to be consumed next
        self.version = 0  # newest published policy version
        self.ended = dict.fromkeys(ENDS, 0)
        self.failed_in_row = 0
        self.filtered_by_step: dict[int, int] = {}
        self.retries = 0
        self.last_failure = ""

    # ------------------------------------------------------------------------------------------- admission

    def step_to_admit(self) -> int | None:
        """The step to which a group should be admitted now; None if no slot is free, or every step has its groups."""
        if len(self.groups) >= self.slots:
            return None
        ahead = range(self.step, min(self.step + self.max_staleness + 1, self.steps))
        return next((step for step in ahead if len(self._active_by_step.get(step, ())) < self.groups_per_step), None)

    def admit(self, step: int, prompt: int) -> Group:
        if step != self.step_to_admit():
            raise LedgerError(f"no group may be admitted to step {step} now (only to: {self.step_to_admit()})")
        position = self._admitted_by_step.get(step, 0)
        group = Group(id=self.next_id, step=step, prompt=prompt, position=position)
        self.groups[group.id] = group
        self._admitted_by_step[step] = position + 1
        self._active_by_step.setdefault(step, {})[group.id] = group
        self.next_id += 1
        return group

    # ------------------------------------------------------------------------------------------- rollout

    def may_start(self, group: int) -> bool:
        """Whether a rollout with the newest published version would be fresh enough when it is consumed."""
        return self.version >= self._get(group).step - self.max_staleness

    def start(self, group: int, version: int) -> None:
        """A worker begins a rollout with `version`: the first one, or another attempt."""
        item = self._expect(group, (QUEUED, RUNNING))
        if version > self.version:
            raise LedgerError(f"group {group}: version {version} is not published yet (newest: {self.version})")
        if version < item.step - self.max_staleness:
            raise LedgerError(
                f"group {group}: version {version} would be {item.step - version} behind at step {item.step}, "
                f"allowed are {self.max_staleness}"
            )
        item.state = RUNNING
        item.version = version

    def scored(self, group: int, retries: int = 0) -> None:
        """All rewards have scored it, after that many retries."""
        self._expect(group, RUNNING).state = SCORED
        self.failed_in_row = 0
        self.retries += retries

    def lost(self, group: int) -> None:
        """Its trajectory is gone (a node died): it needs another rollout."""
        self._expect(group, SCORED).state = QUEUED

    # ------------------------------------------------------------------------------------------- the ends

    def failed(self, group: int, reason: str, retries: int = 0) -> None:
        """It has used up its attempts, `retries` of them since it was last scored; its slot goes to the next prompt."""
        item = self._expect(group, (QUEUED, RUNNING))
        self.last_failure = reason
        self.failed_in_row += 1
        self.retries += retries
        self._end(item, FAILED)

    def filter(self, group: int) -> None:
        """No learning signal (equal rewards): ends the group; its slot goes to the next prompt."""
        item = self._expect(group, SCORED)
        self.filtered_by_step[item.step] = self.filtered_by_step.get(item.step, 0) + 1
        self._end(item, FILTERED)

    def batch(self, learner_version: int) -> list[int] | None:
        """The groups of the current step in id order once all of them are scored, else None."""
        return self.first(learner_version, self.groups_per_step)

    def first(self, learner_version: int, count: int) -> list[int] | None:
        """The first `count` of them, once these are scored.

        They are then certain to be the first of the batch, unless one is lost and fails: a group that is admitted
        later, to replace a filtered or failed one, has a higher id.
        """
        if learner_version != self.step:
            raise LedgerError(f"the learner is at version {learner_version} but step {self.step} is next")
        chosen = self._scored_prefix(self.step, count)
        if len(chosen) < count:
            return None
        for group in chosen:
            version = self.groups[group].version
            behind = learner_version - version if version is not None else -1
            if not 0 <= behind <= self.max_staleness:
                raise LedgerError(f"group {group} is {behind} versions behind, allowed are {self.max_staleness}")
        return chosen

    def scored_first(self, learner_version: int) -> int:
        """The largest `count` for which `first` has an answer."""
        return len(self._scored_prefix(learner_version, self.groups_per_step))

    def _scored_prefix(self, step: int, count: int) -> list[int]:
        """The ids of the first groups of a step up to the first one that is not scored, at most `count`."""
        prefix = takewhile(lambda group: group.state == SCORED, self._active_by_step.get(step, {}).values())
        return [group.id for group in islice(prefix, count)]

    def trained(self, groups: list[int], learner_version: int) -> None:
        """The learner has consumed the current step's batch (it was at `learner_version` before)."""
        if groups != self.batch(learner_version):
            raise LedgerError(f"groups {groups} are not the batch of step {self.step}: {self.batch(learner_version)}")
        for group in groups:
            self._end(self.groups[group], TRAINED)
        for counts in (self.filtered_by_step, self._active_by_step, self._admitted_by_step):
            counts.pop(self.step, None)
        self.step += 1

    def publish(self, version: int) -> None:
        """Policy version `version` may be used by workers from now on."""
        if not self.version <= version <= self.step:
            raise LedgerError(f"cannot publish version {version}: {self.version} is published, {self.step} is trained")
        self.version = version

    @property
    def too_many_failures(self) -> bool:
        return self.failed_in_row > self.max_failed_groups

    # ------------------------------------------------------------------------------------------- accounts

    def counts(self) -> dict[str, int]:
        """Groups admitted, ended by kind, and active by state. admitted = ends + active, always."""
        active = dict.fromkeys(ACTIVE, 0)
        for group in self.groups.values():
            active[group.state] += 1
        return {"admitted": self.next_id, **self.ended, **active}

    def state(self) -> dict[str, Any]:
        """JSON-able. Active groups are included: a resumed run rolls them out again on the same seeds."""
        return {
            "next_id": self.next_id,
            "step": self.step,
            "ended": dict(self.ended),
            "failed_in_row": self.failed_in_row,
            "retries": self.retries,
            "filtered_by_step": {str(step): n for step, n in self.filtered_by_step.items()},
            "active": [
                {"id": g.id, "step": g.step, "prompt": g.prompt, "position": g.position}
                for _, g in sorted(self.groups.items())
            ],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.next_id = int(state["next_id"])
        self.step = self.version = int(state["step"])
        self.ended = {end: int(state["ended"][end]) for end in ENDS}
        self.failed_in_row = int(state["failed_in_row"])
        self.retries = int(state["retries"])
        self.filtered_by_step = {int(step): n for step, n in state["filtered_by_step"].items()}
        self.groups = {g["id"]: Group(**g) for g in state["active"]}
        self._active_by_step = {}
        for _, group in sorted(self.groups.items()):
            self._active_by_step.setdefault(group.step, {})[group.id] = group
        self._admitted_by_step = {}
        for group in self.groups.values():
            self._admitted_by_step[group.step] = max(self._admitted_by_step.get(group.step, 0), group.position + 1)
        counts = self.counts()
        if counts["admitted"] != sum(counts[name] for name in (*ENDS, *ACTIVE)):
            raise LedgerError(f"the saved counts do not add up: {counts}")

    # ------------------------------------------------------------------------------------------- helpers

    def _get(self, group: int) -> Group:
        item = self.groups.get(group)
        if item is None:
            reason = "has already ended" if 0 <= group < self.next_id else "was never admitted"
            raise LedgerError(f"group {group} {reason}")
        return item

    def _expect(self, group: int, states: str | tuple[str, ...]) -> Group:
        item = self._get(group)
        if item.state not in ((states,) if isinstance(states, str) else states):
            raise LedgerError(f"group {group} is {item.state}, expected {states}")
        return item

    def _end(self, item: Group, end: str) -> None:
        item.state = end
        self.ended[end] += 1
        del self._active_by_step[item.step][item.id]
        del self.groups[item.id]
