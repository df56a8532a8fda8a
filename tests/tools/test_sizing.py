"""Sizing: the model of a step's time against counted examples, and what is chosen from it."""

import json

import pytest
from command import run
from made_up_run import make_run

from pipeline.tools.sizing import Timings, choices, choose, measured, size, step_seconds

GUIDE = Timings(groups=8, rollout=320, score={"clip": 40}, learn=90)  # the example of docs/operations.md


def simulated(times: Timings, rollout: int, servers: int) -> float:
    """On-policy, one reward: groups and servers played through one by one."""
    workers, free = [0.0] * rollout, [0.0] * servers
    ends = []
    for _ in range(times.groups):
        i = workers.index(min(workers))
        workers[i] += times.rollout / times.groups
        j = free.index(min(free))
        free[j] = max(free[j], workers[i]) + times.score["clip"] / times.groups
        ends.append(free[j])
    return max(ends) + times.learn + times.sync


@pytest.mark.parametrize("rollout", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("score, servers", [(40, 1), (40, 3), (800, 1), (800, 2), (0, 1)])
def test_on_policy_steps_are_those_of_a_simulation(rollout, score, servers):
    times = Timings(groups=8, rollout=320, score={"clip": score}, learn=90, sync=3)
    expected = simulated(times, rollout, servers)
    assert step_seconds(times, rollout, {"clip": servers}, 0) == pytest.approx(expected, rel=0.12)


def test_on_policy_without_waiting_is_exact():
    assert step_seconds(GUIDE, 4, {"clip": 4}, 0) == 80 + 5 + 90
    assert step_seconds(GUIDE, 1, {"clip": 1}, 0) == 320 + 5 + 90
    assert step_seconds(GUIDE, 8, {"clip": 8}, 0) == step_seconds(GUIDE, 9, {"clip": 9}, 0)  # no ninth group


def test_overlapping_roles_are_bound_by_the_busiest():
    assert step_seconds(GUIDE, 2, {"clip": 1}, 1) == 160
    assert step_seconds(GUIDE, 4, {"clip": 1}, 1) == 90  # the learner
    slow = Timings(groups=8, rollout=320, score={"clip": 400}, learn=90)
    assert step_seconds(slow, 4, {"clip": 2}, 1) == 200
    one_group = Timings(groups=1, rollout=300, score={}, learn=100)  # its way takes 400 s, whatever the workers
    assert step_seconds(one_group, 9, {}, 1) == 200 and step_seconds(one_group, 9, {}, 3) == 100


def test_the_choice_stops_where_workers_no_longer_pay():
    rows = choices(GUIDE, 1)
    assert [row.rollout for row in rows] == [1, 2, 3, 4] and choose(rows, 0.05) is rows[-1]
    assert choose(rows, 0.05).reward == {"clip": 1}
    assert choose(choices(GUIDE, 1, max_rollout=2), 0.05).rollout == 2
    rows = choices(GUIDE, 0)
    assert [row.rollout for row in rows] == [1, 2, 3, 4, 7, 8]  # 5 and 6 need two waves like 4
    assert (
        choose(rows, 0.05).rollout == 8
        and choose(rows, 0.1).rollout == 4
        and choose(rows, 0.2).rollout == 2
        and choose(rows, 0.5).rollout == 1
    )


def test_reward_servers_keep_up_with_the_rollouts():
    slow = Timings(groups=8, rollout=320, score={"clip": 400, "size": 1}, learn=90)
    assert size(slow, 4, 1).reward == {"clip": 5, "size": 1}  # 400 / 5 <= 90
    assert 0 < size(slow, 4, 1).rollout_busy < 1


def test_measured_seconds_are_medians_of_all_workers():
    def record(rollout, score, **more):
        return {"time/rollout": rollout, "time/score": score, "time/learn": 3.0, "time/sync": 0.5, **more}

    rows = [record(99, 9), record(10, 2), record(12, 4), record(11, 3)]
    times = measured(rows, 6, 2, {"clip": 3})
    assert times == Timings(groups=6, rollout=22, score={"clip": 9}, learn=3.0, sync=0.5)
    each = {"time/score/a": 1.0, "time/score/b": 2.0, "workers/rollout": 4}
    times = measured([record(10, 3, **each)] * 3, 6, 2, {"a": 1, "b": 2})
    assert times.rollout == 40 and times.score == {"a": 1, "b": 4}
    with pytest.raises(ValueError):
        measured([{"heldout/mean": 1.0}], 6, 2, {})


def test_size_command(capsys, tmp_path):
    status, out, _ = run(capsys, "size", "--rollout", 320, "--score", "clip=40", "--learn", 90, "--staleness", 1)
    assert status == 0 and out.splitlines()[-1] == "rollout.workers=4 rewards.clip.workers=1"
    folder = make_run(tmp_path, steps=4, finished=False)
    status, out, err = run(capsys, "size", folder)
    assert status == 0 and "rollout.workers=" in out.splitlines()[-1] and "CPUs" in out, err


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "give a run's folder"),
        (["--rollout", "1"], "--learn"),
        (["--rollout", "1", "--learn", "1", "--score", "x=y"], "--score x=y"),
        (["--rollout", "-1", "--learn", "1"], "--rollout -1"),
        (["nowhere"], "not a run"),
    ],
)
def test_size_refuses_in_one_line(capsys, args, words):
    status, _, err = run(capsys, "size", *args)
    assert status == 2 and words in err and err.count("\n") == 1


def test_a_run_without_a_step_has_nothing_to_measure(capsys, tmp_path):
    folder = make_run(tmp_path, steps=1, finished=False)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "heldout/mean": 1.0}) + "\n")
    status, _, err = run(capsys, "size", folder)
    assert status == 2 and "no finished step" in err
