"""Several rewards become one advantage: routing, normalisation, clipping, Pareto sets, uncertainty; each against
numbers calculated by hand or with the papers' formulas."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from pipeline.config.schema import AdvantageConfig, RewardConfig
from pipeline.core.errors import CheckpointError, ConfigError, InputError, RewardError
from pipeline.core.types import Media, PromptItem, RewardScores
from pipeline.rewards.base import Scorer
from pipeline.rewards.repeats import shifted
from pipeline.rewards.routing import check_routing
from pipeline.rewards.runner import RewardRunner
from pipeline.rl import advantages as advantages_module
from pipeline.rl.advantages import compute_advantages, non_dominated, weighted_rewards
from pipeline.rl.reward_combiner import Combiner, Moments

RNG = np.random.default_rng
EPS = 1e-9


@pytest.fixture(autouse=True)
def next_to_no_epsilon(monkeypatch):
    """Numbers worked out by hand have no epsilon in them."""
    monkeypatch.setattr(advantages_module, "EPS", EPS)


def scored(**rewards):
    """One group: name=values, or name=(values, variance); None: the reward does not apply."""
    takes = len(next(v for v in rewards.values() if v is not None))
    scores = {}
    for name, entry in rewards.items():
        values, variance = entry if isinstance(entry, tuple) else (entry, None)
        values = np.full(takes, np.nan) if values is None else values
        variance = None if variance is None else np.asarray(variance, np.float32)
        scores[name] = RewardScores(values=np.asarray(values, np.float32), variance=variance)
    return scores


def combiner(rewards, **advantage):
    configs = {name: RewardConfig(scorer="x", **options) for name, options in rewards.items()}
    return Combiner(configs, AdvantageConfig(**{"clamp": 100, **advantage}))


# ------------------------------------------------------------------------------------------------- the default


@pytest.mark.parametrize("options", [{}, {"std": "global"}, {"std": "none"}, {"combine": "advantages"}])
def test_the_combiner_changes_nothing_unless_told_to(options):
    """Bit for bit the plain formula: (r - mean) / (std + eps) of the weighted sum, or of each reward, then summed."""
    rng = RNG(0)
    groups = [{"a": rng.normal(size=6).astype(np.float32), "b": rng.normal(9, 5, 6).astype(np.float32)} for _ in "123"]
    weights = {"a": 0.3, "b": -1.7}
    combined = Combiner(
        {name: RewardConfig(scorer="x", weight=w) for name, w in weights.items()}, AdvantageConfig(**options)
    )
    result = combined.step([scored(**group) for group in groups])

    def advantages(columns):
        whole = np.concatenate(columns).std()
        stds = {"group": None, "global": whole, "none": 0.0}
        std = stds[options.get("std", "group")]
        return [
            c - c.mean() if std == 0.0 else (c - c.mean()) / ((c.std() if std is None else std) + EPS) for c in columns
        ]

    wide = [{name: values.astype(np.float64) for name, values in group.items()} for group in groups]
    if options.get("combine") == "advantages":
        parts = {name: advantages([group[name] for group in wide]) for name in weights}
        expected = [0.3 * a + -1.7 * b for a, b in zip(parts["a"], parts["b"], strict=True)]
    else:
        total = [np.sum([w * group[n] for n, w in weights.items()], axis=0).astype(np.float32) for group in wide]
        expected = advantages([t.astype(np.float64) for t in total])
    for advantages, unclamped in zip(result.advantages, expected, strict=True):
        np.testing.assert_array_equal(advantages, unclamped.clip(-5, 5).astype(np.float32))
    assert combined.state() == {}


# ------------------------------------------------------------------------------------------------- routing


def test_an_absent_reward_is_absent_and_not_zero():
    groups = [scored(a=[10, 12], b=[1, 3]), scored(a=None, b=[5, 9]), scored(a=[20, 10], b=None)]
    result = combiner({"a": {}, "b": {}}, std="none").step(groups)
    np.testing.assert_allclose([r.tolist() for r in result.rewards], [[11, 15], [5, 9], [20, 10]])
    np.testing.assert_allclose([a.tolist() for a in result.advantages], [[-2, 2], [-2, 2], [5, -5]])
    assert result.metrics["reward/a"] == 13 and result.metrics["reward/b"] == 4.5  # of the takes they apply to
    assert result.metrics["combine/applies/a"] == result.metrics["combine/applies/b"] == pytest.approx(2 / 3)


def test_sums_of_different_rewards_do_not_share_a_std():
    """A global std over [a + b] and [b] alone would mostly measure that a is missing."""
    groups = [scored(a=[1000, 1000], b=[1, 3]), scored(a=[1000, 1000], b=[3, 1]), scored(a=None, b=[1, 3])]
    result = combiner({"a": {}, "b": {}}, std="global").step(groups)
    np.testing.assert_allclose([a.tolist() for a in result.advantages], [[-1, 1], [1, -1], [-1, 1]], rtol=1e-6)


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


def takes(levels, frames=1):
    shape = np.ones((1, frames, 8, 8, 3))
    return Media(frames=(np.asarray(levels).reshape(-1, 1, 1, 1, 1) * shape).astype(np.uint8), fps=8.0)


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

    from actors.evaluation import Evaluator
    from jobs.common.evaluation_table import summarise

    def works(*prompts):
        return SimpleNamespace(prompts=[SimpleNamespace(index=index) for index in prompts])

    jobs = [
        SimpleNamespace(scores=scored(a=[1, 3], b=None, c=None), work=works(0, 1)),
        SimpleNamespace(scores=scored(a=[np.nan, 5], b=[2, 4], c=None), work=works(2, 3)),
    ]
    record = Evaluator._summary(SimpleNamespace(_weights={"a": 1.0, "b": 10.0, "c": 1.0}), jobs)
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


# --------------------------------------------------------------------------------- normalising and clipping


def test_step_normalisation_brings_rewards_to_one_scale():
    groups = [scored(big=[100, 300], small=[0.2, 0.1]), scored(big=[500, 700], small=[0.3, 0.4])]
    result = combiner({"big": {"normalize": "step"}, "small": {"normalize": "step"}}, std="none").step(groups)
    z = {"big": (np.array([100, 300, 500, 700]) - 400) / np.std([100, 300, 500, 700])}
    z["small"] = (np.array([0.2, 0.1, 0.3, 0.4]) - 0.25) / np.std([0.1, 0.2, 0.3, 0.4])
    total = z["big"] + z["small"]
    by_hand = np.concatenate([total[:2] - total[:2].mean(), total[2:] - total[2:].mean()])
    np.testing.assert_allclose(np.concatenate(result.advantages), by_hand, rtol=1e-5)
    assert result.metrics["reward/mean"] == pytest.approx(400.25)  # logged in the scorers' own units
    assert result.metrics["combine/std/big"] == pytest.approx(np.std([100, 300, 500, 700]))
    assert result.metrics["combine/share/big"] == pytest.approx(result.metrics["combine/share/small"], rel=1e-5)


def test_without_normalisation_the_big_scale_decides_and_the_share_says_so():
    result = combiner({"big": {}, "small": {}}).step([scored(big=[0, 99], small=[1, 0])])
    assert result.metrics["combine/share/big"] == pytest.approx(0.99)


def test_running_statistics_are_those_of_all_takes_so_far_and_survive_a_resume():
    rng = RNG(1)
    steps = [[scored(a=rng.normal(50, 7, 5)), scored(a=rng.normal(50, 7, 5))] for _ in range(6)]
    whole = combiner({"a": {"normalize": "running"}}, std="none")
    results = []
    for step in steps:
        whole.step([step[1]])  # called again with other groups: only the last call counts
        results.append(whole.step(step))
        whole.commit()
    seen = np.concatenate([group["a"].values for step in steps for group in step]).astype(np.float64)
    moments = Moments(*whole.state()["a"])
    assert moments.count == 60 and moments.mean == pytest.approx(seen.mean())
    assert moments.std == pytest.approx(seen.std())
    np.testing.assert_allclose(
        results[-1].advantages[0], (steps[-1][0]["a"].values - steps[-1][0]["a"].values.mean()) / seen.std(), rtol=1e-4
    )
    half = combiner({"a": {"normalize": "running"}}, std="none")
    for step in steps[:3]:
        half.step(step)
        half.commit()
    resumed = combiner({"a": {"normalize": "running"}}, std="none")
    resumed.load_state(json.loads(json.dumps(half.state())))
    for step, expected in zip(steps[3:], results[3:], strict=True):
        for mine, theirs in zip(resumed.step(step).advantages, expected.advantages, strict=True):
            np.testing.assert_array_equal(mine, theirs)  # bit for bit
        resumed.commit()
    assert resumed.state() == whole.state()
    with pytest.raises(CheckpointError):
        resumed.load_state({"a": [1, 2]})


def test_a_step_that_was_not_trained_leaves_no_trace():
    one = combiner({"a": {"normalize": "running"}})
    one.step([scored(a=[1, 2])])
    assert one.state() == {}
    assert not one.is_flat(scored(a=[1, 2])) and one.is_flat(scored(a=[2, 2]))
    one.commit()
    assert one.state()["a"][0] == 2  # the group that `is_flat` looked at is not in it


def test_clipping_is_after_normalising_and_hides_what_is_outside():
    groups = [scored(a=[0, 1, 2, 97])]
    result = combiner({"a": {"clip": [0.5, 2]}}, std="none").step(groups)
    np.testing.assert_allclose(result.advantages[0], np.array([0.5, 1, 2, 2]) - 1.375)
    assert result.metrics["combine/clipped/a"] == 0.5 and result.metrics["reward/a"] == 25
    both = combiner({"a": {"clip": [-1, 1], "normalize": "step"}}, std="none").step(groups)
    z = ((np.array([0, 1, 2, 97]) - 25) / np.std([0, 1, 2, 97])).clip(-1, 1)
    np.testing.assert_allclose(both.advantages[0], z - z.mean(), rtol=1e-5)
    assert combiner({"a": {"clip": [0, 1]}}).is_flat(scored(a=[1, 5]))  # equal once clipped
    with pytest.raises(ValueError, match="the first number must be below"):
        RewardConfig(scorer="x", clip=[1, 1])


# --------------------------------------------------------------------------------------------------- Pareto


def dominated_by_hand(values):
    """The definition, take by take."""
    takes = values.shape[1]
    return [
        any(
            all(values[r, b] >= values[r, a] for r in range(len(values)))
            and any(values[r, b] > values[r, a] for r in range(len(values)))
            for b in range(takes)
        )
        for a in range(takes)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_pareto_set_is_the_definition(seed):
    values = RNG(seed).integers(0, 4, (1 + seed % 3, 7)).astype(float)  # with ties
    assert non_dominated(values).tolist() == [not d for d in dominated_by_hand(values)]
    chosen = non_dominated(values)
    assert chosen.any()
    for weights in itertools.product([1, 2.5], repeat=len(values)):  # the best of any positive sum is in it
        assert chosen[(np.asarray(weights)[:, None] * values).sum(0).argmax()]
    np.testing.assert_array_equal(non_dominated(np.exp(values)), chosen)  # only the order matters


def test_parrots_update_is_the_mean_over_the_non_dominated_takes():
    """grad = sum_r (1/n(P)) sum_{i in P} w_r A_r(i) grad log p(i): the learner's mean over K takes must equal it."""
    rng = RNG(3)
    a, b = rng.normal(size=8), rng.normal(size=8) * 40
    score_gradients = rng.normal(size=(8, 5))  # d log p(take) / d theta
    result = combiner({"a": {"weight": 0.7}, "b": {"weight": 0.2}}, combine="pareto").step([scored(a=a, b=b)])
    keep = [not d for d in dominated_by_hand(np.stack([a, b]).astype(np.float32))]
    assert 1 < sum(keep) < 8
    parrot = sum(
        weight * ((r[i] - r.mean()) / r.std()) * score_gradients[i] / sum(keep)
        for weight, r in ((0.7, a), (0.2, b))
        for i in range(8)
        if keep[i]
    )
    learner = (result.advantages[0][:, None] * score_gradients).mean(axis=0)
    np.testing.assert_allclose(learner, parrot, rtol=1e-4)
    assert (result.advantages[0][np.logical_not(keep)] == 0).all()
    assert result.metrics["combine/non_dominated"] == pytest.approx(sum(keep) / 8)


def test_pareto_reads_signs_and_ignores_rewards_of_weight_zero():
    options = {"combine": "pareto"}
    by_sign = combiner({"a": {}, "cost": {"weight": -1.0}}, **options).step([scored(a=[1, 2, 3], cost=[1, 5, 9])])
    assert by_sign.metrics["combine/non_dominated"] == 1  # dearer is worse: all three are compromises
    both_up = combiner({"a": {}, "gain": {}}, **options).step([scored(a=[1, 2, 3], gain=[1, 5, 9])])
    assert both_up.metrics["combine/non_dominated"] == pytest.approx(1 / 3)
    logged = combiner({"a": {}, "x": {"weight": 0}}, **options).step([scored(a=[1, 2, 3], x=[9, 5, 1])])
    assert logged.metrics["combine/non_dominated"] == pytest.approx(1 / 3)
    routed = combiner({"a": {}, "b": {}}, **options).step([scored(a=[1, 2, 3], b=None), scored(a=[1, 2], b=[2, 1])])
    assert [np.count_nonzero(g) for g in routed.advantages] == [1, 0]


@pytest.mark.parametrize("combine", ["advantages", "pareto"])
def test_opposed_rewards_are_not_taken_for_a_flat_group(combine):
    """Their plain sum is constant, their advantages are not (the weights differ)."""
    group = scored(a=[0, 1, 2], b=[6, 4, 2])
    made = combiner({"a": {"weight": 2.0}, "b": {"weight": 1.0}}, combine=combine)
    result = made.step([group])
    assert not result.zero_std[0] and np.abs(result.advantages[0]).max() > 0.5
    assert made.is_flat(scored(a=[1, 1, 1], b=[2, 2, 2]))


# --------------------------------------------------------------------------------------------- uncertainty


@pytest.mark.parametrize("combine", ["rewards", "advantages", "pareto"])
def test_uncertain_takes_count_less_by_exp_minus_u(combine):
    values = np.array([0.0, 1.0, 2.0, 3.0])
    variance = np.array([0.0, 0.5, 2.0, 1e9])
    result = combiner({"a": {}}, combine=combine).step([scored(a=(values, variance))])
    u = variance / values.var()
    expected = (values - values.mean()) / values.std() * np.exp(-u)
    if combine == "pareto":
        expected *= [0, 0, 0, 4]
    np.testing.assert_allclose(result.advantages[0], expected, rtol=1e-5, atol=1e-7)
    trust = result.metrics["combine/trust" if combine == "rewards" else "combine/trust/a"]
    assert trust == pytest.approx(np.exp(-u).mean())


def test_uncertainty_has_no_unit():
    """The same reward in other units, or normalised first, is trusted the same."""
    values, variance = RNG(0).normal(size=6), RNG(1).uniform(0, 1, 6)
    base = combiner({"a": {}}).step([scored(a=(values, variance))]).advantages[0]
    for options, scale in (({}, 100), ({"normalize": "step"}, 1), ({"normalize": "running"}, 7)):
        other = combiner({"a": options}).step([scored(a=(values * scale + 3, variance * scale**2))]).advantages[0]
        np.testing.assert_allclose(other, base, rtol=1e-3, atol=1e-5)


def test_uncertainties_of_summed_rewards_add_up():
    a, b, va, vb = RNG(0).normal(size=(4, 6)) ** 2
    result = combiner({"a": {"weight": 2.0}, "b": {"weight": -3.0}}).step([scored(a=(a, va), b=(b, vb))])
    total = 2 * a - 3 * b
    expected = (total - total.mean()) / total.std() * np.exp(-(4 * va + 9 * vb) / total.var())
    np.testing.assert_allclose(result.advantages[0], expected, rtol=1e-4)


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


def test_rewards_that_are_left_out_of_compute_advantages_keep_their_order():
    group = {"a": np.array([0.0, 1]), "b": np.array([1.0, 0])}
    result = compute_advantages([group], {"b": 1.0, "a": 2.0}, AdvantageConfig())
    assert [key for key in result.metrics if key in ("reward/a", "reward/b")] == ["reward/b", "reward/a"]


def test_config_errors_name_the_key(tmp_path):
    from pipeline.config.load import load_config

    path = tmp_path / "run.yaml"
    path.write_text("generator: {pretrained: x}\nprompts: {train: t.txt}\nrewards: {a: {scorer: ocr}}\n")
    for override, parts in (
        ("rewards.a.normalize=stepp", ["rewards.a.normalize", "did you mean step?"]),
        ("rewards.a.clip=[1]", ["rewards.a.clip", "list of 2 (number)"]),
        ("rewards.a.clip=[2, 1]", ["clip: found [2.0, 1.0]"]),
        ("rewards.a.segments.aggregate=mim", ["rewards.a.segments.aggregate", "'mim'"]),
        ("rewards.a.segments.aggregate=0", ["rewards.a.segments.aggregate", "> 0"]),
        ("algorithm.advantage.combine=paretto", ["algorithm.advantage.combine", "did you mean pareto?"]),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, [override])
        assert all(part in str(caught.value) for part in parts), str(caught.value)
