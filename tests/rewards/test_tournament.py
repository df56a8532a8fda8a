"""Tournaments: win rates against the definition, fairness to places, grouping by prompt, judges that fail."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import REGISTRY, Scorer
from pipeline.rewards.models.pairwise import PairwiseJudge
from pipeline.rewards.runner import build_reward


def takes(*levels, frames=1):
    made = np.ones((len(levels), frames, 4, 4, 3)) * np.reshape(levels, (-1, 1, 1, 1, 1))
    return Media(frames=made.astype(np.uint8), fps=8.0)


def same(n, index=0, text="a"):
    return [PromptItem(index=index, text=text)] * n


@pytest.fixture
def judge(tmp_path):
    """Builds a tournament by a judge of the given body."""

    def make(body, **args):
        path = tmp_path / "judge.py"
        path.write_text(f"import numpy as np\nlog = []\ndef better(a, b, prompt, gain=1.0):\n    {body}\n")
        cfg = RewardConfig(scorer="tournament", args={"judge": f"{path}:better", **args})
        return build_reward("t", cfg)

    return make


BRIGHTER = "x, y = a.mean(), b.mean(); return 0.5 if x == y else float(x > y)"


def test_win_rates_are_the_share_of_matches_won(judge):
    levels = [10, 60, 60, 200, 0]
    result = judge(BRIGHTER, batch=3).run(takes(*levels), same(5), 0)
    by_hand = [
        np.mean([0.5 if x == y else x > y for j, y in enumerate(levels) if j != i]) for i, x in enumerate(levels)
    ]
    np.testing.assert_allclose(result.values, by_hand)
    assert result.values.mean() == pytest.approx(0.5) and (result.parts["matches"] == 8).all()
    assert (result.parts["contradictions"] == 0).all()


def test_probabilities_count_as_they_are(judge):
    result = judge("return 1 / (1 + np.exp(-gain * (a.mean() - b.mean()) / 10))", args={"gain": 2.0}).run(
        takes(10, 20, 40), same(3), None
    )
    p = {(x, y): 1 / (1 + np.exp(-2 * (x - y) / 10)) for x, y in itertools.permutations((10, 20, 40), 2)}
    np.testing.assert_allclose(
        result.values, [np.mean([p[x, y] for y in (10, 20, 40) if y != x]) for x in (10, 20, 40)]
    )


@pytest.mark.parametrize("favour", ["1.0", "0.0", "0.8"])
def test_a_judge_who_favours_a_place_favours_nobody(judge, favour):
    result = judge(f"return {favour}").run(takes(10, 20, 30, 40), same(4), 0)
    np.testing.assert_allclose(result.values, 0.5)
    assert (result.parts["contradictions"] == 1).all()


def test_takes_meet_only_takes_of_their_own_prompt(judge):
    items = same(2, 0, "a") + same(2, 1, "b") + same(1, 0, "a")
    result = judge(BRIGHTER).run(takes(10, 20, 200, 100, 30), items, 0)
    np.testing.assert_allclose(result.values, [0, 0.5, 1, 0, 1])
    with pytest.raises(RewardError, match="two or more takes of a prompt; 'b' has one"):
        judge(BRIGHTER).run(takes(1, 2, 3), same(2) + same(1, 1, "b"), 0)


def test_fewer_opponents_cost_less_and_every_take_plays_as_often(judge):
    result = judge(BRIGHTER, opponents=2).run(takes(*range(0, 80, 10)), same(8), 0)
    assert (result.parts["matches"] == 8).all()  # 2 ahead and 2 behind in the circle, in both orders
    assert result.values.argmax() == 7 and result.values.argmin() == 0


def test_whole_clips_meet_not_their_frames(judge):
    result = judge("assert a.shape == b.shape == (6, 4, 4, 3); " + BRIGHTER).run(takes(9, 5, frames=6), same(2), 0)
    assert result.values.tolist() == [1, 0] and result.segment_values is None


@pytest.mark.parametrize(
    "body, message",
    [
        ("return 1.5", "from 0 to 1"),
        ("return float('nan')", "from 0 to 1"),
        ("return None", "instead of one number"),
        ("return [1, 0]", "instead of one number"),
        ("raise ValueError('no verdict')", "no verdict"),
    ],
)
def test_a_judge_that_returns_garbage_fails_the_scoring(judge, body, message):
    with pytest.raises(RewardError, match=message):
        judge(body).run(takes(1, 2), same(2), 0)


class _Darker(Scorer, PairwiseJudge):
    """A scorer that compares as well."""

    reads = "frame"

    def score(self, media, prompts):
        return -media.frames.mean(axis=(1, 2, 3, 4))

    def compare(self, first, second, prompts):
        return (first.frames.mean(axis=(1, 2, 3, 4)) < second.frames.mean(axis=(1, 2, 3, 4))).astype(float)


def test_judges_are_functions_or_scorers_that_compare(monkeypatch):
    monkeypatch.setitem(REGISTRY, "darker", _Darker)
    runner = build_reward("t", RewardConfig(scorer="tournament", args={"judge": "darker"}))
    assert runner.run(takes(10, 20, 30), same(3), 0).values.tolist() == [1, 0.5, 0]
    for args, message in (
        ({}, "needs this option"),
        ({"judge": "ocr"}, "ocr scores takes one by one"),
        ({"judge": "nothing"}, "unknown scorer 'nothing'"),
        ({"judge": 3}, "judge: found 3"),
        ({"judge": "x.py:f"}, r"x\.py is not there"),
        ({"judge": "darker", "opponents": -1}, "opponents: found -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_reward("t", RewardConfig(scorer="tournament", args=args))
