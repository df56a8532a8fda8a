"""The verdict on made-up evaluations: improved, no measurable change, suspect."""

import numpy as np
import pytest
from fake_checkpoint import fake_config

from pipeline.rl.evaluation import summarise_scores
from pipeline.runs.verdict import judge, tolerances

PROMPTS = np.arange(40)
WEIGHTS = {"proxy": 1.0, "gold": 0.0}
ALLOWED = {"brightness": 0.12, "distance": 1.0, "duplicates": 0.1}


def record(step, proxy=0.5, gold=0.5, spread=0.02, seed=None, prompts=PROMPTS, **guards):
    """An evaluation; each prompt keeps its difficulty, and `spread` is what changes at random."""
    difficulty = np.random.default_rng(7).normal(0, 0.2, len(prompts))
    noise = np.random.default_rng(step if seed is None else seed)
    of = {name: mean + difficulty + noise.normal(0, spread, len(prompts)) for name, mean in
          (("proxy", proxy), ("gold", gold))}  # fmt: skip
    measured = {name: mean + noise.normal(0, 0.01, len(prompts)) for name, mean in guards.items()}
    return {"step": step, **summarise_scores(of, WEIGHTS, prompts, measured).record()}


def verdict(*records, weights=WEIGHTS):
    return judge(records, weights, ALLOWED)


def test_the_first_evaluation_has_none():
    assert verdict(record(0)) is None


def test_improved_and_no_measurable_change():
    better = verdict(record(0), record(10, proxy=0.65))
    assert better.kind == "improved" and better.text.startswith("improved (held-out reward +0.14")
    same = verdict(record(0), record(10, proxy=0.501))
    assert same.kind == "same" and same.text.startswith("no measurable change (held-out reward -0.00")
    worse = verdict(record(0), record(10, proxy=0.488))  # between the 95 % interval and what makes it suspect
    assert worse.kind == "worse" and worse.text.startswith("worse (held-out reward -0.01")
    alone = verdict(record(0, prompts=PROMPTS[:1]), record(10, proxy=0.9, prompts=PROMPTS[:1]))
    assert alone.kind == "same" and "single prompt" in alone.text


def test_a_guard_beyond_its_tolerance_is_suspect():
    start, end = record(0, brightness=0.5), record(10, proxy=0.9, brightness=0.9)
    assert verdict(start, end).text == f"suspect: brightness ({start['guards']['brightness']['mean']:.3g} → " + (
        f"{end['guards']['brightness']['mean']:.3g})"
    )
    within = verdict(start, record(10, proxy=0.9, brightness=0.6))
    assert within.kind == "improved"
    assert judge([start, end], WEIGHTS, {}).kind == "improved"  # switched off


def test_distance_needs_no_baseline():
    far = verdict(record(0), record(10, proxy=0.9, distance=1.2))
    assert [suspect.name for suspect in far.suspects] == ["distance"] and far.suspects[0].before == 0
    assert verdict(record(0), record(10, proxy=0.9, distance=0.8)).kind == "improved"


def test_gold_that_falls_from_its_peak_is_suspect():
    """The over-optimisation curve: gold rises with the proxy, and then falls, still above where it began."""
    rising = [record(0), record(10, proxy=0.6, gold=0.6), record(20, proxy=0.7, gold=0.7)]
    assert verdict(*rising).kind == "improved"
    fallen = verdict(*rising, record(30, proxy=0.8, gold=0.62))
    (suspect,) = fallen.suspects
    assert (suspect.name, suspect.kind, suspect.since) == ("gold", "gold", 20) and "since step 20" in fallen.text
    assert suspect.before == pytest.approx(0.7, abs=0.1) and suspect.after < suspect.before


def test_a_trained_reward_that_falls_is_suspect_whatever_the_sum_does():
    weights = {"proxy": 1.0, "gold": 0.2}
    fallen = verdict(record(0), record(10, proxy=0.8, gold=0.4), weights=weights)
    assert [(suspect.name, suspect.kind) for suspect in fallen.suspects] == [("gold", "reward")]
    weights = {"proxy": 1.0, "gold": -0.2}  # less of it is better
    assert verdict(record(0), record(10, proxy=0.8, gold=0.4), weights=weights).kind == "improved"


def test_few_honest_runs_are_suspect():
    """100 runs in which nothing changes, with a gold, two guards and eight evaluations each."""
    rng, alarms = np.random.default_rng(3), 0
    for _ in range(100):
        records = [
            record(step, spread=0.2, seed=int(rng.integers(2**31)), brightness=0.5, duplicates=0.05)
            for step in range(9)
        ]
        alarms += any(verdict(*records[: count + 1]).kind == "suspect" for count in range(1, 9))
    assert alarms <= 10  # in any of eight verdicts


def test_a_fall_that_is_clear_but_a_trifle_is_none():
    assert verdict(record(0), record(10, proxy=0.6, gold=0.495, spread=0.005)).kind == "improved"
    assert verdict(record(0), record(10, proxy=0.6, gold=0.45, spread=0.005)).kind == "suspect"


def test_tolerances_of_the_config(tmp_path):
    cfg = fake_config(tmp_path, evaluation={"guards": {"motion": None, "brightness": 3.0}})
    found = tolerances(cfg)
    assert "motion" not in found and found["brightness"] == 3.0 and found["contrast"] > 1
