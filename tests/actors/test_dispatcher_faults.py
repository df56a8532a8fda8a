"""The dispatcher under random faults: every group ends exactly once, and only its own failures count."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter

import pytest
from dispatcher_world import World, fail_times, scores_of
from ray import exceptions as rx

from actors.group_run import GroupFailed, GroupState
from actors.ray_errors import WorkerPreempted, first_error
from pipeline.core.errors import RewardAway, RewardError, RewardUnavailable
from pipeline.rewards import patience


@pytest.fixture
def world(tmp_path, monkeypatch):
    return lambda **options: World(tmp_path, monkeypatch, **options)


@pytest.mark.parametrize("seed", range(6))
def test_random_faults_keep_the_invariants(world, seed):
    """Every group ends exactly once: scored, or failed after exactly its attempts; all its attempts use the same seeds,
    and nothing that is not its own counts."""
    rng = random.Random(seed)
    max_attempts = rng.choice([1, 2, 3])
    w = world(
        rollout_workers=rng.choice([1, 3]),
        servers=rng.choice([1, 2]),
        rewards=("a", "b"),
        faults={"max_attempts": max_attempts},
    )
    charged: Counter[int] = Counter()
    charged_scorings: Counter[int] = Counter()
    errors = [MemoryError("ill"), RewardError("bad"), WorkerPreempted("asked to end"), rx.RayActorError()]

    def on_rollout(worker, works):
        if rng.random() < 0.3:
            error = rng.choice(errors)
            if len(works) == 1 and not isinstance(error, WorkerPreempted):
                charged[works[0].group] += 1
            raise error
        for work in works:
            charged_scorings[work.group] = 0

    def on_score(server, groups):
        if rng.random() < 0.15:
            error = rng.choice([*errors, rx.ObjectLostError("00", None, "")])
            if len(groups) == 1 and isinstance(error, rx.ObjectLostError):
                charged[groups[0]] += 1
            elif len(groups) == 1 and not isinstance(error, WorkerPreempted):
                charged_scorings[groups[0]] += 1
            raise error
        bad = [group for group in groups if rng.random() < 0.1]
        charged_scorings.update(bad)
        return [RewardError("bad") if group in bad else scores_of([group])[0] for group in groups]

    async def a_moment() -> None:
        await asyncio.sleep(rng.random() * 1e-3)

    w.on_rollout, w.on_score = on_rollout, on_score
    w.rollout_takes = w.scoring_takes = a_moment

    async def body():
        runs = [w.group(number) for number in range(60)]
        calls = [w.together(runs[i : i + 3]) for i in range(0, 60, 3)]
        return runs, [outcome for outcomes in await asyncio.gather(*calls) for outcome in outcomes]

    runs, outcomes = w.run(body)
    seeds: dict[int, set] = {}
    for _, works in w.rollouts:
        for work in works:
            seeds.setdefault(work.group, set()).add(work.seeds)
            assert work.attempt <= max_attempts
    assert all(len(of_group) == 1 for of_group in seeds.values()) and len(seeds) == 60
    failed = [run for run, outcome in zip(runs, outcomes, strict=True) if outcome is not None]
    assert all(isinstance(outcome, GroupFailed | None) for outcome in outcomes)
    assert 0 < len(failed) < 60 if max_attempts == 1 else len(failed) < 60
    for run, outcome in zip(runs, outcomes, strict=True):
        if outcome is None:
            assert run.state is GroupState.SCORED and list(run.scores) == ["a", "b"]
            assert charged[run.group] == run.failed_rollouts < max_attempts
        else:
            # late scorings of a group that has failed already, or is drawn again, are not its own any more
            assert outcome.attempts == max_attempts
            assert charged[run.group] >= max_attempts or charged_scorings[run.group] >= max_attempts
        assert run.requests == {}


# ------------------------------------------------------------------------------------- a service that is away


def test_a_service_that_is_away_is_waited_for_and_no_attempt_is_counted(world, monkeypatch, caplog):
    """Longer than any number of attempts, with several groups at once; the log says so in two lines."""
    monkeypatch.setattr(patience, "MIN_PAUSE_S", 0.01)
    w = world(servers=2, faults={"max_attempts": 1, "call_timeout_s": 30})
    back_at = time.monotonic() + 0.3

    def on_score(server, groups):
        away = RewardAway("reward a: http://there: cannot be reached")
        return [away] * len(groups) if time.monotonic() < back_at else scores_of(groups)

    w.on_score = on_score
    with caplog.at_level(logging.WARNING):
        runs, outcomes = w.run(lambda: _score_all(w, 4))
    assert outcomes == [None] * 4 and all(run.failed_scorings == run.retries == 0 for run in runs)
    assert len(w.scorings) > 8 and len(w.rollouts) == 4
    said = [record.message for record in caplog.records if "reward a is" in record.message]
    assert len(said) == 2 and "is away: " in said[0] and "faults.call_timeout_s" in said[0] and "is back" in said[1]


def test_the_patience_is_bounded_for_the_outage_not_for_each_group(world, monkeypatch):
    monkeypatch.setattr(patience, "MIN_PAUSE_S", 0.01)
    w = world(faults={"max_attempts": 9, "call_timeout_s": 0.3})
    w.on_score = lambda server, groups: [RewardAway("reward a: cannot be reached")] * len(groups)

    async def body():
        first = await _score_all(w, 2)
        tries = len(w.scorings)
        later = await _score_all(w, 1)
        return first, later, len(w.scorings) - tries

    (_, first), (_, later), tries = w.run(body)
    for outcome in [*first, *later]:
        assert isinstance(outcome, GroupFailed) and "away for " in outcome.reason
    assert tries == 1


def test_a_refusal_is_an_attempt(world):
    w = world(faults={"max_attempts": 2})
    w.on_score = lambda server, groups: [RewardUnavailable("reward a: the server answered 401")] * len(groups)
    _, outcomes = w.run(lambda: _score_all(w, 1))
    assert outcomes[0].attempts == 2 and len(w.scorings) == 2


@pytest.mark.parametrize("known", ["ready before", "resumed", "never"])
def test_a_server_that_starts_while_its_service_is_away(world, monkeypatch, known):
    """It is waited for when the service has answered before; an address that never has is refused at once."""
    monkeypatch.setattr(patience, "MIN_PAUSE_S", 0.01)
    w = world(faults={"max_restarts": 0})
    pool = w.dispatcher.pools[1]
    pool._patient = known == "resumed"
    away = fail_times(3, RewardAway("reward a: cannot be reached"))
    calls = []

    def on_start(starting):
        if starting is pool and (known != "ready before" or pool.replaced):
            calls.append(starting)
            away()

    async def body():
        if known == "ready before":
            pool.replace(pool.slots[0], "for the test")
            while len(calls) < 4 or not pool.slots[0].alive:
                await asyncio.sleep(0.001)

    w.on_start = on_start
    if known == "never":
        with pytest.raises(ExceptionGroup) as failure:
            asyncio.run(w.dispatcher.run())
        assert isinstance(first_error(failure.value), RewardAway) and len(calls) == 1
    else:
        w.run(body)
        assert len(calls) == 4


async def _score_all(w: World, count: int):
    runs = [w.group(number) for number in range(count)]
    return runs, await asyncio.gather(*(w.run_group(run) for run in runs), return_exceptions=True)
