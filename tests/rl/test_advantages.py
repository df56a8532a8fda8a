"""Group-relative advantages: hand-computed cases and invariances."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.rl.signals import group_relative as advantages
from pipeline.rl.signals.advantages import Advantages
from pipeline.rl.signals.group_relative import compute_advantages, weighted_rewards


@pytest.fixture
def no_epsilon(monkeypatch):
    """Numbers worked out by hand have no epsilon in them."""
    monkeypatch.setattr(advantages, "EPS", 1e-12)


def run(groups, weights=None, **options):
    scores = [g if isinstance(g, dict) else {"r": np.array(g, np.float32)} for g in groups]
    return compute_advantages(scores, weights or {"r": 1.0}, Advantages(**options))


def test_group_std_by_hand(no_epsilon):
    result = run([[0.0, 1.0], [0.2, 0.6]])
    np.testing.assert_allclose(result.advantages[0], [-1, 1], atol=1e-5)
    np.testing.assert_allclose(result.advantages[1], [-1, 1], atol=1e-5)


def test_global_std_by_hand(no_epsilon):
    groups = [[0.0, 1.0], [0.4, 0.6]]
    whole = np.std([0.0, 1.0, 0.4, 0.6])
    result = run(groups, std="global")
    np.testing.assert_allclose(result.advantages[1], np.array([-0.1, 0.1]) / whole, rtol=1e-5)


def test_no_std_only_centres():
    np.testing.assert_allclose(run([[1.0, 4.0]], std="none").advantages[0], [-1.5, 1.5])


def test_affine_rewards_give_the_same_advantages_and_sum_to_zero(no_epsilon):
    rewards = np.random.default_rng(0).normal(size=8)
    a = run([rewards]).advantages[0]
    b = run([3 * rewards + 7]).advantages[0]
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert abs(a.sum()) < 1e-5


@pytest.mark.parametrize("rewards", [[0.5] * 4, [0.5, 0.5 + 1e-7, 0.5, 0.5]])
def test_ties_give_no_advantage(rewards):
    result = run([rewards])
    assert result.zero_std == [True]
    np.testing.assert_array_equal(result.advantages[0], 0.0)
    assert result.metrics["zero_std_ratio"] == 1.0


def test_ties_inside_a_global_std_step_give_no_advantage():
    result = run([[0.5, 0.5 + 1e-7], [0.0, 1.0]], std="global")
    np.testing.assert_array_equal(result.advantages[0], 0.0)


def test_clamp():
    rewards = [0.0] * 99 + [1.0]
    assert run([rewards], clamp=5.0).advantages[0].max() == 5.0


def test_combining_rewards_and_advantages_differ_as_they_should(no_epsilon):
    group = {"big": np.array([0.0, 100.0], np.float32), "small": np.array([1.0, 0.0], np.float32)}
    weights = {"big": 1.0, "small": 1.0}
    by_reward = run([group], weights).advantages[0]
    np.testing.assert_allclose(by_reward, [-1, 1], atol=1e-5)  # the big scale decides
    by_advantage = run([group], weights, combine="advantages").advantages[0]
    np.testing.assert_allclose(by_advantage, [0, 0], atol=1e-5)  # each reward counts the same
    np.testing.assert_allclose(weighted_rewards(group, {"big": 0.5, "small": 2.0}), [2.0, 50.0])


def test_group_order_does_not_matter():
    groups = [[0.0, 1.0, 0.3], [0.4, 0.6, 0.1]]
    forward, backward = run(groups, std="global"), run(groups[::-1], std="global")
    np.testing.assert_allclose(forward.advantages[0], backward.advantages[1], rtol=1e-6)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        run([[0.0, float("nan")]])
