"""The dispatcher under random faults: every group ends exactly once, and only its own failures count."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from dispatcher_world import World, scores_of
from ray import exceptions as rx

from actors.group_run import GroupFailed, GroupState
from actors.ray_errors import WorkerPreempted
from pipeline.core.errors import RewardError


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
