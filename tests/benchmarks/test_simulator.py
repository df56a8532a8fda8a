"""The simulator's workers on the real controller and a real Ray."""

from __future__ import annotations

import pytest

from benchmarks.speed.simulator import Plan, simulate

pytestmark = pytest.mark.ray


def test_a_small_simulation_runs_on_the_real_controller(cluster):
    plan = Plan(workers=2, rollout_s=0.2, score_s=0.05, steps=4)
    found = simulate(plan)
    assert 0.2 < found["efficiency"] < 1.2 and found["controller_ms_per_group"] > 0
    assert found["groups_per_s"] == pytest.approx(plan.groups_per_step / found["step_s"])
