"""The standard error: prompts are the independent units, one definition for training, evaluate and the report."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from made_up_run import make_run
from rich.console import Console

from actors.evaluation import summary_record
from jobs.common.evaluation_table import print_table, summarise
from jobs.common.progress import eval_line
from pipeline.core import statistics
from pipeline.core.statistics import estimate, t_quantile, win_rate, wins, with_error
from pipeline.core.types import RewardScores, TakeMeasurements
from pipeline.rl.evaluation import changes, paired_difference, summarise_scores
from pipeline.tools.report.report import build_report

PROMPTS = np.array([3, 3, 0, 0, 7, 7])
TAKES = np.array([0.2, 0.4, 0.1, 0.3, 0.9, 0.7])


@pytest.mark.parametrize(
    "freedom, value", [(1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (63, 1.998), (10_000, 1.9602)]
)
def test_t_quantiles(freedom, value):
    assert t_quantile(freedom) == pytest.approx(value, abs=0.001)


def test_estimates_treat_prompts_as_the_independent_units():
    values, prompts = np.array([1.0, 3.0, 5.0, 7.0]), np.array([0, 0, 1, 1])
    result = estimate(values, prompts)
    assert result.mean == 4 and result.n == 2 and result.se == pytest.approx(2.0)  # of the means 2 and 6
    assert result.ci95 == pytest.approx(2 * 12.706, abs=0.01)
    assert win_rate(np.array([1, 2, 3.0]), np.array([0, 2, 5.0]), np.arange(3)).mean == pytest.approx(0.5)
    assert wins(np.array([-2.0, 0.0, 0.1])).tolist() == [0.0, 0.5, 1.0]


def test_a_single_prompt_has_no_error_instead_of_zero():
    result = estimate(TAKES, np.zeros(6))
    assert (result.se, result.ci95, result.n) == (None, None, 1)
    assert with_error(result.mean, result.se) == "0.4333"


def test_evaluation_rows_are_paired():
    base = np.random.default_rng(0).normal(size=50).astype(np.float32)
    first, second = summarise({"a": {"x": base}, "b": {"x": base + np.float32(0.1)}}, {"x": 1.0}, np.arange(50))
    assert "difference" not in first and second["win_rate"]["mean"] == 1.0
    assert second["difference"]["mean"] == pytest.approx(0.1)
    assert second["difference"]["ci95"] < 1e-6 < first["reward"]["ci95"]


def test_evaluation_rows_have_a_verdict_against_the_first():
    prompts, rng = np.arange(30), np.random.default_rng(0)
    base = rng.normal(size=30).astype(np.float32)
    scores = {label: {"x": base + np.float32(gain)} for label, gain in (("a", 0), ("b", 0.5), ("c", 0.5))}
    colours = rng.integers(0, 256, (30, 192), dtype=np.uint8)
    copies = np.broadcast_to(colours[:1], colours.shape)
    measured = {
        label: TakeMeasurements(values={"brightness": np.full(30, 0.5, np.float32)}, descriptors=descriptors)
        for label, descriptors in (("a", colours), ("b", colours), ("c", copies))
    }
    first, better, hacked = summarise(scores, {"x": 1.0}, prompts, measured, {"duplicates": 0.1, "brightness": 0.1})
    assert "verdict" not in first and better["verdict"]["kind"] == "improved"
    assert hacked["verdict"]["text"] == "suspect: duplicates (0 → 1)"
    with (console := Console(width=120)).capture() as printed:
        print_table([first, better, hacked], ["x"], console, 30, 30)
    assert "c: suspect: duplicates (0 → 1)" in printed.get()


def test_differences_between_evaluations_are_paired_over_prompts():
    before, after = ({"prompt_means": means} for means in ([0.1, 0.5, 0.9], [0.2, 0.7, 0.9]))
    difference = paired_difference(before, after)
    assert difference.mean == pytest.approx(0.1) and difference.se == pytest.approx(0.1 / 3**0.5)
    assert paired_difference({}, after) is None and paired_difference({"prompt_means": [0.1]}, after) is None


def test_each_reward_is_paired_over_the_prompts_it_applies_to():
    prompts = np.array([4, 4, 9, 9, 2, 2])
    before = {"a": np.array([0.0, 2, 5, 5, 1, 1]), "b": np.array([1.0, 1, np.nan, np.nan, 3, 3])}
    after = {"a": np.array([1.0, 3, 6, 6, 2, 2]), "b": np.array([3.0, 3, np.nan, np.nan, 3, 3])}
    weights = {"a": 1.0, "b": 0.5}
    first, last = (summarise_scores(scores, weights, prompts).record() for scores in (before, after))
    found = changes(first, last)
    assert first["prompts"] == [2, 4, 9] and first["rewards"]["b"]["prompt_means"] == [3.0, 1.0, None]
    assert (found.rewards["a"].mean, found.rewards["a"].se, found.rewards["a"].n) == (1.0, 0.0, 3)
    assert (found.rewards["b"].mean, found.rewards["b"].se, found.rewards["b"].n) == (1.0, 1.0, 2)
    shifted = {**last, "prompts": [4, 9, 11]}  # another choice of prompts: paired where both have them
    assert changes(first, shifted).rewards["a"].n == 2


def test_a_change_within_its_interval_is_no_change():
    changed = np.array([0.1, -0.05, 0.12, -0.02])
    assert estimate(changed, np.arange(4)).direction() == "same"
    assert estimate(changed + 0.3, np.arange(4)).direction() == "up"
    assert estimate(changed - 0.3, np.arange(4)).direction() == "down"
    assert estimate(changed + 0.3, np.zeros(4)).direction() == "unknown"


def test_intervals_cover_the_true_change():
    """2,000 simulated runs: 12 prompts of different difficulty, 4 takes each, which share how much their prompt gains.
    Counting takes as independent, as error bands of takes do, covers far less than 95 %."""
    rng = np.random.default_rng(0)
    prompts, gain, runs = np.repeat(np.arange(12), 4), 0.1, 2000
    covered = by_takes = 0
    for _ in range(runs):
        difficulty, gains = rng.normal(0, 0.3, 12), rng.normal(gain, 0.15, 12)
        before = difficulty[prompts] + rng.normal(0, 0.1, 48)
        after = (difficulty + gains)[prompts] + rng.normal(0, 0.1, 48)
        found = paired_difference(
            *(summarise_scores({"x": each}, {"x": 1.0}, prompts).record() for each in (before, after))
        )
        covered += abs(found.mean - gain) <= found.ci95
        takes = estimate(after - before, np.arange(48))
        by_takes += abs(takes.mean - gain) <= takes.ci95
    assert 0.93 <= covered / runs <= 0.97
    assert by_takes / runs < 0.85


def test_train_evaluate_and_report_print_the_same_error(tmp_path):
    """The same takes: by the evaluation of a run in its log line, by `rushes evaluate`, and in the report."""
    weights = {"scene": 1.0}
    groups = [slice(0, 4), slice(4, 6)]  # batches of an evaluation need not end with a prompt
    jobs = [
        SimpleNamespace(
            scores={"scene": RewardScores(values=TAKES[group].astype(np.float32))},
            work=SimpleNamespace(prompts=[SimpleNamespace(index=index) for index in PROMPTS[group]]),
        )
        for group in groups
    ]
    record = {"step": 0, "tag": "train", **summary_record(jobs, weights)}
    expected = with_error(np.mean([0.3, 0.2, 0.8]), np.std([0.3, 0.2, 0.8], ddof=1) / 3**0.5)
    assert eval_line(record) == f"held-out reward at step 0: {expected} (3 prompts)"

    rows = summarise({"try": {"scene": TAKES.astype(np.float32)}}, weights, PROMPTS)
    with (console := Console(width=120)).capture() as printed:
        print_table(rows, ["scene"], console, 3, 6)
    assert expected in printed.get()

    folder = make_run(tmp_path, steps=3, finished=False)
    (folder / "evals.jsonl").write_text(json.dumps(record) + "\n")
    html = re.sub(r"<[^>]*>", "", build_report(folder).read_text())
    assert f"{record['mean']:.3f} ± {record['se']:.3f}" in html and "over 3 prompts" in html
    assert summarise_scores({"scene": TAKES}, weights, PROMPTS).reward.estimate.se == pytest.approx(record["se"])


def test_an_unpaired_difference_is_welchs():
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(0)
    first, last = rng.normal(0, 1, 9), rng.normal(1, 3, 30)
    found = statistics.unpaired_difference(*(statistics.estimate_of_means(each) for each in (first, last)))
    interval = ttest_ind(last, first, equal_var=False).confidence_interval(0.95)
    assert found.mean == pytest.approx(last.mean() - first.mean())
    assert found.ci95 == pytest.approx((interval.high - interval.low) / 2, rel=5e-3)  # whole degrees of freedom
    assert found.n == int(ttest_ind(last, first, equal_var=False).df) + 1
