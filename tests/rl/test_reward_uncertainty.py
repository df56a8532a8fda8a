"""Repeated scoring: the variance of a take's scores, and how uncertain takes count less in advantages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scored_groups import advantages_of, combiner, scored, takes

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer
from pipeline.rewards.repeats import shifted
from pipeline.rewards.runner import RewardRunner
from pipeline.rl.signals import group_relative as advantages_module

RNG = np.random.default_rng


EPS = 1e-9


@pytest.fixture(autouse=True)
def next_to_no_epsilon(monkeypatch):
    """Numbers worked out by hand have no epsilon in them."""
    monkeypatch.setattr(advantages_module, "EPS", EPS)


@pytest.mark.parametrize("combine", ["rewards", "advantages", "pareto"])
def test_uncertain_takes_count_less_by_exp_minus_u(combine):
    values = np.array([0.0, 1.0, 2.0, 3.0])
    variance = np.array([0.0, 0.5, 2.0, 1e9])
    result = combiner({"a": {}}, combine=combine).step([scored(a=(values, variance))])
    u = variance / values.var()
    expected = (values - values.mean()) / values.std() * np.exp(-u)
    if combine == "pareto":
        expected *= [0, 0, 0, 4]
    np.testing.assert_allclose(advantages_of(result)[0], expected, rtol=1e-5, atol=1e-7)
    trust = result.metrics["combine/trust" if combine == "rewards" else "combine/trust/a"]
    assert trust == pytest.approx(np.exp(-u).mean())


def test_uncertainty_has_no_unit():
    """The same reward in other units, or normalised first, is trusted the same."""
    values, variance = RNG(0).normal(size=6), RNG(1).uniform(0, 1, 6)
    base = advantages_of(combiner({"a": {}}).step([scored(a=(values, variance))]))[0]
    for options, scale in (({}, 100), ({"normalize": "step"}, 1), ({"normalize": "running"}, 7)):
        other = advantages_of(combiner({"a": options}).step([scored(a=(values * scale + 3, variance * scale**2))]))[0]
        np.testing.assert_allclose(other, base, rtol=1e-3, atol=1e-5)


def test_uncertainties_of_summed_rewards_add_up():
    a, b, va, vb = RNG(0).normal(size=(4, 6)) ** 2
    result = combiner({"a": {"weight": 2.0}, "b": {"weight": -3.0}}).step([scored(a=(a, va), b=(b, vb))])
    total = 2 * a - 3 * b
    expected = (total - total.mean()) / total.std() * np.exp(-(4 * va + 9 * vb) / total.var())
    np.testing.assert_allclose(advantages_of(result)[0], expected, rtol=1e-4)


class Border(Scorer):
    """Notices a shift on textured takes only."""

    reads = "frame"

    def __init__(self):
        self.calls = 0

    def score(self, media, prompts):
        self.calls += 1
        return media.frames[:, 0, 16, 16, 0].astype(np.float32)


def test_repeats_score_shifted_copies_in_training_only():
    rng = RNG(0)
    smooth = np.full((32, 32, 3), 100, np.uint8)
    noisy = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    media = Media(frames=np.stack([smooth, noisy])[:, None], fps=1.0)
    items = [PromptItem(index=0, text="a")] * 2
    scorer = Border()
    runner = RewardRunner("b", RewardConfig(scorer="x", score_repeats=5), scorer)
    trained = runner.run(media, items, 3)
    assert scorer.calls == 5 and trained.variance[0] == 0 < trained.variance[1]
    np.testing.assert_allclose(trained.parts["spread"] ** 2, trained.variance, rtol=1e-5)
    again = runner.run(media, items, 3)
    np.testing.assert_array_equal(trained.values, again.values)  # a function of the seed
    scorer.calls = 0
    evaluated = runner.run(media, items, None)
    assert scorer.calls == 1 and evaluated.variance is None and evaluated.values[1] == noisy[16, 16, 0]


def test_the_variance_is_that_of_the_scores_and_the_value_their_mean():
    given = iter([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])

    class Scripted(Scorer):
        reads = "frame"

        def score(self, media, prompts):
            return next(given)

    result = RewardRunner("s", RewardConfig(scorer="x", score_repeats=3), Scripted()).run(
        takes([1, 2]), [PromptItem(index=0, text="a")] * 2, 0
    )
    np.testing.assert_allclose(result.values, [3, 5])
    np.testing.assert_allclose(result.variance, [np.var([1, 2, 6], ddof=1), 0])


@pytest.mark.parametrize("size", [(1, 1), (8, 20), (64, 96)])
def test_shifted_copies_keep_size_and_are_one_shift_for_all(size):
    frames = RNG(0).integers(0, 256, (2, 3, *size, 3)).astype(np.uint8)
    moved = [shifted(Media(frames=frames, fps=8), seed).frames for seed in range(12)]
    assert all(m.shape == frames.shape for m in moved)
    if size != (1, 1):
        assert all((m != frames).any() for m in moved) and any((m != moved[0]).any() for m in moved)
    for m in moved:
        y, x = size[0] // 2, size[1] // 2
        offsets = {
            (dy, dx)
            for dy, dx in itertools.product((-2, -1, 0, 1, 2), (-3, -2, -1, 0, 1, 2, 3))
            if 0 <= y + dy < size[0] and 0 <= x + dx < size[1] and (m[:, :, y, x] == frames[:, :, y + dy, x + dx]).all()
        }
        assert offsets or size == (1, 1)


def test_a_failing_repeat_fails_the_scoring():
    class Breaks(Border):
        def score(self, media, prompts):
            return super().score(media, prompts) if self.calls < 2 else np.full(len(prompts), np.nan)

    with pytest.raises(RewardError, match="NaN"):
        RewardRunner("b", RewardConfig(scorer="x", score_repeats=4), Breaks()).run(
            Media(frames=np.zeros((1, 1, 32, 32, 3), np.uint8), fps=1.0), [PromptItem(index=0, text="a")], 0
        )
