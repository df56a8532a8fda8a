"""The autoscaling policy, on made-up loads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.autoscale import WINDOW_S, History, Load, decide
from pipeline.config.resources import WorkerRange

CALM = Load(
    size=2, starting=0, busy=2, depth=0, waited_s=0.0, call_s=4.0, peak=2, watched_s=0.0, window_s=WINDOW_S
)  # fmt: skip


@pytest.mark.parametrize(
    "change, limits, size, reason",
    [
        ({}, (1, 4), 2, ""),
        ({"depth": 3, "waited_s": 4.9}, (1, 4), 2, ""),  # not for long yet
        ({"depth": 3, "waited_s": 6.0}, (1, 4), 4, "3 requests waiting, the oldest for 6 s (a call takes 4 s)"),
        ({"depth": 3, "waited_s": 6.0, "call_s": 9.0}, (1, 4), 2, ""),  # a worker will soon be free
        ({"depth": 1, "waited_s": 6.0}, (1, 4), 3, "1 request waiting"),
        ({"depth": 9, "waited_s": 60.0}, (1, 9), 4, "9 requests"),  # at most doubled
        ({"depth": 9, "waited_s": 60.0, "starting": 1}, (1, 9), 2, ""),  # wait for the new one first
        ({"depth": 9, "waited_s": 60.0}, (1, 2), 2, ""),
        ({"size": 3, "peak": 1, "watched_s": 59.0}, (1, 4), 3, ""),
        ({"size": 3, "peak": 1, "watched_s": 60.0}, (1, 4), 1, "no more than 1 had work at once in the last 60 s"),
        ({"size": 3, "peak": 3, "watched_s": 60.0}, (1, 4), 3, ""),
        ({"size": 3, "peak": 0, "watched_s": 60.0}, (2, 4), 2, "no more than 0"),
        ({"size": 1}, (2, 4), 2, "at least 2"),
        ({"size": 6}, (2, 4), 4, "at most 4"),
        ({"size": 6, "depth": 9, "waited_s": 99.0}, (2, 4), 4, "at most 4"),
    ],
)
def test_policy(change, limits, size, reason):
    decision = decide(replace(CALM, **change), WorkerRange(*limits))
    assert decision.size == size
    assert reason in decision.reason and bool(decision.reason) == (size != replace(CALM, **change).size)


def test_a_window_spans_two_steps_so_that_the_learners_turn_frees_nobody():
    history = History()
    history.step(100.0)
    for second in range(0, 200, 5):  # 20 s of rollout with three at work, then 80 s of learning, twice
        busy = 3 if second % 100 < 20 else 0
        load = history.load(float(second), size=3, starting=0, busy=busy, depth=0, waited_s=0.0)
        assert decide(load, WorkerRange(1, 4)).size == 3
    for second in range(200, 600, 5):  # nobody needs them any more
        load = history.load(float(second), size=3, starting=0, busy=0, depth=0, waited_s=0.0)
        if decide(load, WorkerRange(1, 4)).size == 1:
            break
    assert 300 <= second <= 330


def test_history_forgets_what_another_size_did_and_averages_the_calls():
    history = History()
    for second in range(0, 70, 10):
        load = history.load(float(second), size=2, starting=0, busy=0, depth=0, waited_s=0.0)
    assert load.watched_s == 60 and load.peak == 0 and load.call_s == 0
    history.resized()
    history.finished(2.0)
    history.finished(4.0)
    load = history.load(70.0, size=1, starting=0, busy=1, depth=2, waited_s=1.0)
    assert (load.watched_s, load.peak, load.call_s) == (0.0, 3, 3.0)
    history.step(50.0)
    history.step(10.0)
    assert history.step_s == 40.0 and history.window_s == 80.0
