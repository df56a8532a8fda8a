"""The group life cycle: plain cases, then thousands of random events under the invariants of design section 3."""

import json
import random

import pytest

from pipeline.rl.ledger import ACTIVE, ENDS, QUEUED, RUNNING, SCORED, Ledger, LedgerError


def make(groups_per_step=2, max_staleness=0, max_failed_groups=3, steps=100, slots=None) -> Ledger:
    return Ledger(
        groups_per_step=groups_per_step,
        max_staleness=max_staleness,
        max_failed_groups=max_failed_groups,
        steps=steps,
        slots=slots,
    )


def admit_all(ledger: Ledger) -> list[int]:
    ids = []
    while (step := ledger.step_to_admit()) is not None:
        ids.append(ledger.admit(step, prompt=ledger.next_id * 10).id)
    return ids


def startable(ledger: Ledger) -> list[int]:
    """Queued groups that may start now, in id order."""
    return [g for g in sorted(ledger.groups) if ledger.groups[g].state == QUEUED and ledger.may_start(g)]


def score(ledger: Ledger, group: int) -> None:
    ledger.start(group, ledger.version)
    ledger.scored(group)


def test_one_step_from_admission_to_training():
    ledger = make()
    assert admit_all(ledger) == [0, 1]
    for group in (1, 0):  # arrival order does not matter
        assert ledger.batch(0) is None
        score(ledger, group)
    assert ledger.batch(0) == [0, 1]
    ledger.trained([0, 1], 0)
    ledger.publish(1)
    assert ledger.counts() == {"admitted": 2, "trained": 2, "filtered": 0, "failed": 0, **dict.fromkeys(ACTIVE, 0)}
    assert admit_all(ledger) == [2, 3]


def test_the_first_groups_of_a_step_are_handed_out_while_the_rest_is_drawn():
    ledger = make(groups_per_step=3)
    admit_all(ledger)
    score(ledger, 1)
    assert ledger.first(0, 1) is None and ledger.scored_first(0) == 0  # group 0 may still come
    score(ledger, 0)
    assert ledger.first(0, 1) == [0] and ledger.first(0, 2) == [0, 1] and ledger.first(0, 3) is None
    assert ledger.scored_first(0) == 2
    ledger.filter(0)
    assert ledger.first(0, 1) == [1] and ledger.first(0, 2) is None and ledger.scored_first(0) == 1


def test_filtered_group_gives_its_slot_to_the_next_prompt_of_the_same_step():
    ledger = make()
    admit_all(ledger)
    score(ledger, 0)
    ledger.filter(0)
    assert ledger.step_to_admit() == 0
    assert ledger.admit(0, prompt=7).id == 2
    assert ledger.step_to_admit() is None
    score(ledger, 2)
    score(ledger, 1)
    assert ledger.batch(0) == [1, 2]
    assert ledger.filtered_by_step == {0: 1}


def test_another_attempt_starts_from_a_running_group():
    ledger = make()
    admit_all(ledger)
    for _ in range(5):
        ledger.start(0, 0)
    assert startable(ledger) == [1] and ledger.retries == 0
    ledger.scored(0, retries=4)
    assert ledger.retries == 4
    with pytest.raises(LedgerError, match="expected"):
        ledger.start(0, 0)


def test_failed_group_gives_its_slot_back_and_counts_in_a_row():
    ledger = make(max_failed_groups=1)
    admit_all(ledger)
    ledger.start(0, 0)
    ledger.failed(0, "boom", retries=1)
    assert ledger.counts()["failed"] == 1 and ledger.step_to_admit() == 0 and not ledger.too_many_failures
    score(ledger, 1)  # a success in between starts the count again
    assert ledger.failed_in_row == 0
    for _ in range(2):
        group = ledger.admit(0, prompt=0).id
        score(ledger, group)
        ledger.lost(group)
        assert startable(ledger) == [group]
        ledger.failed(group, "node died")
    assert ledger.failed_in_row == 1  # the lost ones had been scored
    group = ledger.admit(0, prompt=0).id
    ledger.start(group, 0)
    ledger.failed(group, "node died")
    assert ledger.too_many_failures and ledger.last_failure == "node died" and ledger.retries == 1


def test_a_lost_group_is_drawn_again():
    ledger = make()
    admit_all(ledger)
    score(ledger, 0)
    score(ledger, 1)
    ledger.lost(0)
    assert ledger.batch(0) is None and startable(ledger) == [0]
    with pytest.raises(LedgerError, match="expected"):
        ledger.lost(0)
    score(ledger, 0)
    assert ledger.batch(0) == [0, 1]


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_group_starts_only_when_its_policy_will_be_fresh_enough(staleness):
    ledger = make(groups_per_step=1, max_staleness=staleness)
    ids = admit_all(ledger)
    assert len(ids) == staleness + 1 and startable(ledger) == ids  # version 0 is within the bound of all of them
    score(ledger, 0)
    ledger.trained(ledger.batch(0), 0)
    (late,) = admit_all(ledger)
    assert not ledger.may_start(late) and late not in startable(ledger)  # version 1 is trained, not published
    with pytest.raises(LedgerError, match="behind"):
        ledger.start(late, 0)
    ledger.publish(1)
    assert ledger.may_start(late)
    ledger.start(late, 1)


def test_staleness_is_checked_again_at_consumption():
    ledger = make(groups_per_step=1)
    admit_all(ledger)
    score(ledger, 0)
    ledger.groups[0].version = -1
    with pytest.raises(LedgerError, match="behind"):
        ledger.batch(0)


def test_slots_bound_the_active_groups():
    ledger = make(groups_per_step=2, max_staleness=3, slots=3)
    assert len(admit_all(ledger)) == 3
    with pytest.raises(LedgerError, match="no group may be admitted"):
        ledger.admit(1, prompt=0)
    with pytest.raises(ValueError, match="slots"):
        make(groups_per_step=4, slots=3)


def test_nothing_is_admitted_beyond_the_last_step():
    ledger = make(groups_per_step=1, max_staleness=5, steps=2)
    assert len(admit_all(ledger)) == 2


def test_illegal_transitions_raise():
    ledger = make()
    admit_all(ledger)
    with pytest.raises(LedgerError, match="never admitted"):
        ledger.start(99, 0)
    with pytest.raises(LedgerError, match="not published"):
        ledger.start(0, 1)
    for transition in (ledger.scored, ledger.lost, ledger.filter):
        with pytest.raises(LedgerError, match="expected"):
            transition(0)
    ledger.start(0, 0)
    for transition in (ledger.lost, ledger.filter):
        with pytest.raises(LedgerError, match="expected"):
            transition(0)
    with pytest.raises(LedgerError, match="learner is at"):
        ledger.batch(1)
    with pytest.raises(LedgerError, match="not the batch"):
        ledger.trained([0, 1], 0)
    with pytest.raises(LedgerError, match="publish"):
        ledger.publish(1)
    ledger.scored(0)
    with pytest.raises(LedgerError, match="expected"):
        ledger.failed(0, "boom")
    ledger.filter(0)
    for transition in (ledger.filter, ledger.scored, ledger.lost):
        with pytest.raises(LedgerError, match="already ended"):
            transition(0)


def test_state_survives_json_and_requeues_what_was_in_flight():
    ledger = make(max_staleness=1)
    admit_all(ledger)
    score(ledger, 0)
    ledger.filter(0)
    ledger.start(1, 0)
    other = make(max_staleness=1)
    other.load_state(json.loads(json.dumps(ledger.state())))
    assert other.next_id == 4 and sorted(other.groups) == [1, 2, 3]
    assert startable(other) == [1, 2, 3] and [g.prompt for g in other.groups.values()] == [10, 20, 30]
    assert other.filtered_by_step == {0: 1}
    assert other.admit(0, prompt=5).id == 4
    broken = ledger.state() | {"next_id": 9}
    with pytest.raises(LedgerError, match="add up"):
        make().load_state(broken)


EVENTS = ["admit", "start", "start", "start_again", "fails", "lost", "finish", "resume"]


class Chaos:
    """Drives a ledger by random events and keeps its own independent books."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        staleness = self.rng.choice([0, 0, 1, 3])
        per_step = self.rng.choice([1, 2, 5])
        self.args = dict(
            groups_per_step=per_step,
            max_staleness=staleness,
            max_failed_groups=10**9,
            steps=self.rng.choice([5, 40]),
            slots=per_step * (staleness + 1) + self.rng.choice([0, 0, 2]),
        )
        self.ledger = make(**self.args)
        self.ends: dict[int, str] = {}
        self.step_of: dict[int, int] = {}
        self.version_of: dict[int, int] = {}
        self.trained_batches: list[list[int]] = []
        self.trained = 0  # learner version

    def end(self, group: int, how: str) -> None:
        assert group not in self.ends, f"group {group} ended twice"
        self.ends[group] = how

    def event(self) -> None:
        ledger, rng = self.ledger, self.rng
        kind = rng.choice(EVENTS)
        by_state = {state: [g for g in ledger.groups.values() if g.state == state] for state in ACTIVE}
        if kind == "admit" and (step := ledger.step_to_admit()) is not None:
            group = ledger.admit(step, prompt=rng.randrange(50))
            assert group.id not in self.step_of
            self.step_of[group.id] = step
        elif kind == "start" and (ready := startable(ledger)):
            group = rng.choice(ready)
            version = rng.randint(max(0, ledger.groups[group].step - ledger.max_staleness), ledger.version)
            ledger.start(group, version)
            self.version_of[group] = version
        elif kind == "start_again" and by_state[RUNNING]:
            group = rng.choice(by_state[RUNNING])
            ledger.start(group.id, ledger.version)
            self.version_of[group.id] = ledger.version
        elif kind == "fails" and by_state[RUNNING] and rng.random() < 0.2:
            group = rng.choice(by_state[RUNNING])
            ledger.failed(group.id, "died")
            self.end(group.id, "failed")
        elif kind == "lost" and by_state[SCORED] and rng.random() < 0.1:
            ledger.lost(rng.choice(by_state[SCORED]).id)
        elif kind == "finish":
            self.finish(by_state[RUNNING])
        elif kind == "resume" and rng.random() < 0.02:
            saved = json.loads(json.dumps(ledger.state()))
            self.ledger = make(**self.args)
            self.ledger.load_state(saved)

    def finish(self, running) -> None:
        ledger, rng = self.ledger, self.rng
        if running:
            group = rng.choice(running)
            ledger.scored(group.id)
            if rng.random() < 0.2:
                ledger.filter(group.id)
                self.end(group.id, "filtered")
        batch = ledger.batch(self.trained) if self.trained < ledger.steps else None
        if batch is not None:
            ledger.trained(batch, self.trained)
            for group in batch:
                self.end(group, "trained")
                assert self.step_of[group] == self.trained
                assert 0 <= self.trained - self.version_of[group] <= ledger.max_staleness
            self.trained_batches.append(batch)
            self.trained += 1
            ledger.publish(self.trained)

    def check(self) -> None:
        counts = self.ledger.counts()
        assert counts["admitted"] == len(self.step_of) == self.ledger.next_id
        assert counts["admitted"] == sum(counts[name] for name in (*ENDS, *ACTIVE))
        for end in ENDS:
            assert counts[end] == sum(1 for how in self.ends.values() if how == end)
        assert set(self.ledger.groups) == set(self.step_of) - set(self.ends)
        assert len(self.ledger.groups) <= self.ledger.slots
        self.check_step_to_admit()

    def check_step_to_admit(self) -> None:
        """The ledger's running counts against a walk over all active groups."""
        ledger = self.ledger
        ahead = range(ledger.step, min(ledger.step + ledger.max_staleness + 1, ledger.steps))
        held = {step: sum(g.step == step for g in ledger.groups.values()) for step in ahead}
        short = [step for step in ahead if held[step] < ledger.groups_per_step]
        full = len(ledger.groups) >= ledger.slots
        assert ledger.step_to_admit() == (None if full or not short else short[0])
        scored = [g.id for g in ledger.groups.values() if g.step == ledger.step and g.state == "scored"]
        ready = len(scored) == ledger.groups_per_step and self.trained == ledger.step < ledger.steps
        if self.trained == ledger.step:
            assert (ledger.batch(self.trained) is not None) == ready


@pytest.mark.parametrize("seed", range(12))
def test_random_events_keep_the_invariants(seed):
    chaos = Chaos(seed)
    for _ in range(3000):
        chaos.event()
        chaos.check()
    assert chaos.trained > 0
    for step, batch in enumerate(chaos.trained_batches):
        # the batch is the first N unfiltered groups of its step in id order
        size = chaos.ledger.groups_per_step
        mine = [g for g, s in chaos.step_of.items() if s == step]
        unfiltered = [g for g in mine if chaos.ends.get(g) not in ("filtered", "failed")]
        assert batch == sorted(unfiltered)[:size] and len(batch) == size
    if chaos.trained == chaos.ledger.steps:
        assert not chaos.ledger.groups  # every admitted group has ended


@pytest.mark.parametrize("order_seed", range(6))
def test_the_batch_does_not_depend_on_who_finishes_first(order_seed):
    """Groups 0, 3 and 4 have equal rewards; whatever the order of arrival, the step trains on 1, 2, 5, 6."""
    ledger, rng = make(groups_per_step=4), random.Random(order_seed)
    while ledger.batch(0) is None:
        admit_all(ledger)
        group = rng.choice([g.id for g in ledger.groups.values() if g.state == "queued"])
        score(ledger, group)
        if group in (0, 3, 4):
            ledger.filter(group)
    assert ledger.batch(0) == [1, 2, 5, 6] and ledger.next_id == 7
