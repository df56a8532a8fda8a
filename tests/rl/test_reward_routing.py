"""Rewards that apply to some prompts only: advantages, scoring, evaluations, kept takes, and checks before a run."""

from __future__ import annotations

import numpy as np
import pytest
from scored_groups import advantages_of, combiner, scored, takes

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import InputError
from pipeline.core.types import PromptItem, RewardScores
from pipeline.rewards.base import Scorer
from pipeline.rewards.routing import check_routing
from pipeline.rewards.runner import RewardRunner
from pipeline.rl.signals import group_relative as advantages_module
from pipeline.rl.signals.group_relative import weighted_rewards

EPS = 1e-9


@pytest.fixture(autouse=True)
def next_to_no_epsilon(monkeypatch):
    """Numbers worked out by hand have no epsilon in them."""
    monkeypatch.setattr(advantages_module, "EPS", EPS)


def test_an_absent_reward_is_absent_and_not_zero():
    groups = [scored(a=[10, 12], b=[1, 3]), scored(a=None, b=[5, 9]), scored(a=[20, 10], b=None)]
    made = combiner({"a": {}, "b": {}}, std="none")
    result, rewards = made.step(groups), made._advantages(made._preparation.prepare(groups)).rewards
    np.testing.assert_allclose([r.tolist() for r in rewards], [[11, 15], [5, 9], [20, 10]])
    np.testing.assert_allclose([a.tolist() for a in advantages_of(result)], [[-2, 2], [-2, 2], [5, -5]])
    assert result.metrics["reward/a"] == 13 and result.metrics["reward/b"] == 4.5  # of the takes they apply to
    assert result.metrics["combine/applies/a"] == result.metrics["combine/applies/b"] == pytest.approx(2 / 3)


def test_sums_of_different_rewards_do_not_share_a_std():
    """A global std over [a + b] and [b] alone would mostly measure that a is missing."""
    groups = [scored(a=[1000, 1000], b=[1, 3]), scored(a=[1000, 1000], b=[3, 1]), scored(a=None, b=[1, 3])]
    result = combiner({"a": {}, "b": {}}, std="global").step(groups)
    np.testing.assert_allclose([a.tolist() for a in advantages_of(result)], [[-1, 1], [1, -1], [-1, 1]], rtol=1e-6)


def test_a_group_without_any_reward_and_nan_in_a_scored_group_are_refused():
    with pytest.raises(ValueError, match="no reward applies"):
        combiner({"a": {}}).step([scored(a=[1, 2]), {"a": RewardScores(values=np.full(2, np.nan, np.float32))}])
    with pytest.raises(ValueError, match="a is not finite"):
        combiner({"a": {}}).step([scored(a=[1, float("nan")])])
    assert weighted_rewards({"a": np.array([1, np.nan]), "b": np.array([2.0, 2])}, {"a": 1, "b": 1}).tolist() == [3, 2]


class Seen(Scorer):
    reads = "frame"

    def __init__(self):
        self.prompts = []

    def score(self, media, prompts):
        self.prompts += [p.text for p in prompts]
        return {"score": media.frames.mean(axis=(1, 2, 3, 4)), "part": np.ones(len(prompts))}


def test_a_reward_is_not_shown_takes_it_does_not_apply_to():
    items = [
        PromptItem(index=0, text="all"),
        PromptItem(index=1, text="other", metadata={"rewards": ["text"]}),
        PromptItem(index=2, text="mine", metadata={"rewards": ["text", "looks"]}),
    ]
    scorer = Seen()
    cfg = RewardConfig(scorer="x", segments={"aggregate": "min"})
    result = RewardRunner("looks", cfg, scorer).run(takes([10, 20, 30], frames=4), items, 0)
    np.testing.assert_array_equal(result.values, [10, np.nan, 30])
    np.testing.assert_array_equal(result.parts["part"], [1, np.nan, 1])
    assert set(scorer.prompts) == {"all", "mine"} and np.isnan(result.segment_values[1]).all()
    assert result.segment_weights.shape == (3, 4) and np.isnan(result.segment_weights[1]).all()
    none = RewardRunner("looks", cfg, scorer).run(takes([20]), items[1:2], 0)
    assert np.isnan(none.values).all() and "other" not in scorer.prompts


def test_evaluations_average_a_reward_over_the_takes_it_applies_to():
    from types import SimpleNamespace

    from actors.evaluation import summary_record
    from jobs.common.evaluation_table import summarise

    def works(*prompts):
        return SimpleNamespace(prompts=[SimpleNamespace(index=index) for index in prompts])

    jobs = [
        SimpleNamespace(scores=scored(a=[1, 3], b=None, c=None), work=works(0, 1)),
        SimpleNamespace(scores=scored(a=[np.nan, 5], b=[2, 4], c=None), work=works(2, 3)),
    ]
    record = summary_record(jobs, {"a": 1.0, "b": 10.0, "c": 1.0})
    assert record["mean"] == (1 + 3 + 20 + 45) / 4 and record["n"] == 4
    b = record["rewards"]["b"]
    assert record["rewards"]["a"]["mean"] == 3 and (b["mean"], b["se"], b["n"]) == (3.0, 1.0, 2)
    assert "c" not in record["rewards"]
    columns = {"a": np.array([1, np.nan, 3]), "b": np.full(3, np.nan), "c": np.ones(3)}
    row = summarise({"x": columns}, {"a": 1.0, "b": 1.0, "c": 1.0}, np.arange(3))[0]
    assert row["rewards"]["a"]["mean"] == 2 and row["rewards"]["a"]["n"] == 2 and row["rewards"]["b"] is None


def test_kept_takes_have_no_score_where_a_reward_does_not_apply(tmp_path):
    from pipeline.core.takes_table import read_takes, save_takes

    items = [PromptItem(index=0, text="a"), PromptItem(index=1, text="b")]
    save_takes(tmp_path, None, items, [1, 2], 0, scored(a=[1, 2], b=[np.nan, 5]), weights={"a": 1.0, "b": 2.0})
    first, second = read_takes(tmp_path)
    assert (first["reward"], first["reward/b"]) == (1, None) and (second["reward"], second["reward/b"]) == (12, 5)


@pytest.mark.parametrize(
    "rewards, message",
    [
        (["ocr", "aesthetik"], "p.jsonl, line 2: metadata.rewards: .*no reward 'aesthetik'; did you mean aesthetic?"),
        ([], "expected a list of the config's rewards"),
        ("ocr", "found 'ocr'"),
        ([1], "expected a list"),
    ],
)
def test_routing_is_checked_before_the_run(rewards, message):
    prompts = [PromptItem(index=0, text="a"), PromptItem(index=1, text="b", metadata={"rewards": rewards})]
    with pytest.raises(InputError, match=message):
        check_routing(prompts, ["ocr", "aesthetic"], ["line 1", "line 2"], "p.jsonl")
