"""The signal `pairs`: which takes are compared, by what, how much a pair counts, and labels that are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from scored_groups import scored

from pipeline.config.parts import SIGNALS
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import CheckpointError, ConfigError


def state_of(weights=None, **options):
    rewards = {name: RewardConfig(scorer="x", weight=weight) for name, weight in (weights or {"a": 1.0}).items()}
    return SIGNALS.get("pairs")(**options).begin(rewards)


def test_rankdpo_weighs_pairs_of_win_rates_by_what_swapping_them_does_to_the_dcg():
    state = state_of({"a": 1.0, "b": 1.0}, choose="all", combine="wins", weigh="dcg")
    result = state.step([scored(a=[300, 100, 200], b=[1, 2, 9])])
    (taught,) = result.feedback
    # Win rates 1, 0, 1/2 and 0, 1/2, 1: on average 1/2, 1/4, 3/4, so that the takes rank 2, 3, 1.
    assert taught.pairs.tolist() == [[2, 0], [2, 1], [0, 1]]
    discount = 1 / np.log([2, 3, 4])
    published = np.array(
        [
            (2**0.75 - 2**0.5) * (discount[0] - discount[1]),
            (2**0.75 - 2**0.25) * (discount[0] - discount[2]),
            (2**0.5 - 2**0.25) * (discount[1] - discount[2]),
        ]
    )
    np.testing.assert_allclose(taught.pair_weights, published / published.mean(), rtol=1e-5)
    np.testing.assert_allclose(taught.pair_gaps, [0.25, 0.5, 0.25])
    assert result.metrics["pairs/gap"] == pytest.approx(1 / 3) and result.metrics["reward/a"] == 200


def test_win_rates_heed_weights_ties_and_rewards_that_do_not_apply():
    state = state_of({"a": 3.0, "b": -1.0, "c": 1.0, "watched": 0.0}, combine="wins", choose="best_others")
    group = scored(a=[5, 5, 1], b=[2, 1, 3], c=None, watched=[9, 0, 0])
    (taught,) = state.step([group]).feedback
    # a: 3/4, 3/4, 0 by three quarters; b, lower is better: 1/2, 1, 0 by one quarter.
    assert taught.pairs.tolist() == [[1, 0], [1, 2]]
    np.testing.assert_allclose(taught.pair_gaps, [(1 - 0.5) / 4, 0.75 * 0.75 + 0.25])
    assert state.is_flat(scored(a=[1, 2], b=[1, 2], c=[3, 3], watched=[1, 2])) is False
    assert state.is_flat(scored(a=[1, 1], b=[2, 2], c=[3, 3], watched=[1, 2]))
    assert state_of({"a": 0.0}, combine="wins").is_flat(scored(a=[1, 2]))


def test_no_reward_makes_up_for_another_in_the_harmonic_mean():
    state = state_of({"a": 0.3, "b": 0.7, "watched": 0.0}, combine="harmonic", choose="best_others")
    (taught,) = state.step([scored(a=[0.5, 1.0, 1.0], b=[0.5, 0.1, -0.2], watched=[-1, 0, 0])]).feedback
    assert taught.pairs.tolist() == [[0, 1], [0, 2]]
    second = 1 / (0.3 / 1.0 + 0.7 / 0.1)
    np.testing.assert_allclose(taught.pair_gaps, [0.5 - second, 0.5], rtol=1e-6)
    twice = state_of({"a": 0.6, "b": 1.4}, combine="harmonic").step([scored(a=[0.5, 1.0], b=[0.5, 0.1])])
    np.testing.assert_allclose(twice.feedback[0].pair_gaps, [0.5 - second], rtol=1e-6)
    cfg = tiny.config(tiny.Path("unused"), signal={"name": "pairs", "combine": "harmonic"})
    name = next(iter(cfg.rewards))
    negative = cfg.model_copy(update={"rewards": {name: cfg.rewards[name].model_copy(update={"weight": -1.0})}})
    with pytest.raises(
        ConfigError, match=f"rewards.{name}.weight: found -1; signal.combine=harmonic takes weights of 0"
    ):
        cfg.signal.check(negative)
    cfg.signal.check(cfg)


def test_gapo_weighs_a_pair_against_the_pairs_of_its_step():
    signal = SIGNALS.get("pairs")(weigh="exp_gap")
    assert signal.needs_whole_step({}) and not SIGNALS.get("pairs")().needs_whole_step({})
    first, second = (
        signal.begin({"a": RewardConfig(scorer="x")}).step([scored(a=[1, 5, 3]), scored(a=[2, 2, 1])]).feedback
    )
    assert first.pairs.tolist() == [[1, 0]] and second.pairs.tolist() == [[0, 2]]
    published = np.array([2**5 - 2**1, 2**2 - 2**1])
    np.testing.assert_allclose([*first.pair_weights, *second.pair_weights], published / 16, rtol=1e-6)


def test_labels_are_drawn_from_bradley_terry():
    state = state_of(choose="best_worst", temperature=0.5)
    groups = [scored(a=[0.0, 0.75, 0.5])] * 3000
    result = state.step(groups)
    agree = np.array([each.pairs.tolist() == [[1, 0]] for each in result.feedback])
    expected = 1 / (1 + np.exp(-0.75 / 0.5))
    assert abs(agree.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / len(groups))
    assert result.metrics["pairs/swapped"] == pytest.approx(1 - agree.mean())
    assert all(each.pairs.tolist() == [[0, 1]] for each, right in zip(result.feedback, agree, strict=True) if not right)
    assert {float(each.pair_gaps[0]) for each in result.feedback} == {0.75, -0.75}
    sure = state_of(temperature=1e-9).step(groups[:50]).feedback  # no overflow
    assert all(each.pairs.tolist() == [[1, 0]] for each in sure)


def test_a_retry_and_a_resumed_run_draw_the_same_labels():
    def drawn(state):
        return [each.pairs.tolist() for each in state.step([scored(a=[0, 1, 2, 3])] * 8).feedback]

    whole = state_of(choose="all", temperature=2.0)
    first = drawn(whole)
    assert drawn(whole) == first, "the step is tried again"
    whole.commit()
    second = drawn(whole)
    assert second != first
    resumed = state_of(choose="all", temperature=2.0)
    half = state_of(choose="all", temperature=2.0)
    drawn(half)
    half.commit()
    resumed.load_state(half.state())
    assert drawn(resumed) == second
    resumed.load_state(None)
    assert drawn(resumed) == first
    for broken in ({"pairs/groups": []}, {"pairs/groups": ["many"]}, 3):
        with pytest.raises(CheckpointError, match="count of groups that were trained cannot be read"):
            resumed.load_state(broken)
