"""Several rewards become one advantage: normalisation, clipping, Pareto sets; each against numbers calculated by hand
or with the papers' formulas."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import tiny
from scored_groups import advantages_of, combiner, scored

from pipeline.config.parts import SIGNALS
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.rl.signals import group_relative as advantages_module
from pipeline.rl.signals.advantages import Advantages, AdvantageState
from pipeline.rl.signals.group_relative import compute_advantages, non_dominated
from pipeline.rl.signals.prepared_scores import Moments

RNG = np.random.default_rng


EPS = 1e-9


@pytest.fixture(autouse=True)
def next_to_no_epsilon(monkeypatch):
    """Numbers worked out by hand have no epsilon in them."""
    monkeypatch.setattr(advantages_module, "EPS", EPS)


@pytest.mark.parametrize("options", [{}, {"std": "global"}, {"std": "none"}, {"combine": "advantages"}])
def test_the_combiner_changes_nothing_unless_told_to(options):
    """Bit for bit the plain formula: (r - mean) / (std + eps) of the weighted sum, or of each reward, then summed."""
    rng = RNG(0)
    groups = [{"a": rng.normal(size=6).astype(np.float32), "b": rng.normal(9, 5, 6).astype(np.float32)} for _ in "123"]
    weights = {"a": 0.3, "b": -1.7}
    combined = AdvantageState(
        {name: RewardConfig(scorer="x", weight=w) for name, w in weights.items()}, Advantages(**options)
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
    for advantages, unclamped in zip(advantages_of(result), expected, strict=True):
        np.testing.assert_array_equal(advantages, unclamped.clip(-5, 5).astype(np.float32))
    assert combined.state() == {}


def test_step_normalisation_brings_rewards_to_one_scale():
    groups = [scored(big=[100, 300], small=[0.2, 0.1]), scored(big=[500, 700], small=[0.3, 0.4])]
    result = combiner({"big": {"normalize": "step"}, "small": {"normalize": "step"}}, std="none").step(groups)
    z = {"big": (np.array([100, 300, 500, 700]) - 400) / np.std([100, 300, 500, 700])}
    z["small"] = (np.array([0.2, 0.1, 0.3, 0.4]) - 0.25) / np.std([0.1, 0.2, 0.3, 0.4])
    total = z["big"] + z["small"]
    by_hand = np.concatenate([total[:2] - total[:2].mean(), total[2:] - total[2:].mean()])
    np.testing.assert_allclose(np.concatenate(advantages_of(result)), by_hand, rtol=1e-5)
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
        advantages_of(results[-1])[0],
        (steps[-1][0]["a"].values - steps[-1][0]["a"].values.mean()) / seen.std(),
        rtol=1e-4,
    )
    half = combiner({"a": {"normalize": "running"}}, std="none")
    for step in steps[:3]:
        half.step(step)
        half.commit()
    resumed = combiner({"a": {"normalize": "running"}}, std="none")
    resumed.load_state(json.loads(json.dumps(half.state())))
    for step, expected in zip(steps[3:], results[3:], strict=True):
        for mine, theirs in zip(advantages_of(resumed.step(step)), advantages_of(expected), strict=True):
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
    np.testing.assert_allclose(advantages_of(result)[0], np.array([0.5, 1, 2, 2]) - 1.375)
    assert result.metrics["combine/clipped/a"] == 0.5 and result.metrics["reward/a"] == 25
    both = combiner({"a": {"clip": [-1, 1], "normalize": "step"}}, std="none").step(groups)
    z = ((np.array([0, 1, 2, 97]) - 25) / np.std([0, 1, 2, 97])).clip(-1, 1)
    np.testing.assert_allclose(advantages_of(both)[0], z - z.mean(), rtol=1e-5)
    assert combiner({"a": {"clip": [0, 1]}}).is_flat(scored(a=[1, 5]))  # equal once clipped
    with pytest.raises(ValueError, match="the first number must be below"):
        RewardConfig(scorer="x", clip=[1, 1])


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
    learner = (advantages_of(result)[0][:, None] * score_gradients).mean(axis=0)
    np.testing.assert_allclose(learner, parrot, rtol=1e-4)
    assert (advantages_of(result)[0][np.logical_not(keep)] == 0).all()
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
    assert [np.count_nonzero(g) for g in advantages_of(routed)] == [1, 0]


@pytest.mark.parametrize("combine", ["advantages", "pareto"])
def test_opposed_rewards_are_not_taken_for_a_flat_group(combine):
    """Their plain sum is constant, their advantages are not (the weights differ)."""
    group = scored(a=[0, 1, 2], b=[6, 4, 2])
    made = combiner({"a": {"weight": 2.0}, "b": {"weight": 1.0}}, combine=combine)
    result = made.step([group])
    assert not made.is_flat(group) and np.abs(advantages_of(result)[0]).max() > 0.5
    assert made.is_flat(scored(a=[1, 1, 1], b=[2, 2, 2]))


def test_rewards_that_are_left_out_of_compute_advantages_keep_their_order():
    group = {"a": np.array([0.0, 1]), "b": np.array([1.0, 0])}
    result = compute_advantages([group], {"b": 1.0, "a": 2.0}, Advantages())
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
        ("signal.combine=paretto", ["signal.combine", "did you mean pareto?"]),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, [override])
        assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_only_the_extremes_of_a_group_train():
    options = SIGNALS.get("extremes")(std="none", best=1, worst=2)
    state = options.begin({"a": RewardConfig(scorer="x")})
    (kept,) = advantages_of(state.step([scored(a=[4, 1, 9, 2, 3, 5])]))
    centred = np.array([4, 1, 9, 2, 3, 5]) - 4.0
    np.testing.assert_allclose(kept, centred * [0, 2, 2, 2, 0, 0])  # 6 takes, 3 of which train
    with pytest.raises(ConfigError, match="signal.best: 1 best and 2 worst takes are more than step.takes"):
        options.check(tiny.config(tiny.Path("unused"), step={"takes": 2}))


def test_of_every_branch_the_extremes_train_unless_they_are_near_the_mean():
    """B2-DiffuRL: two branches of three takes; what is compared with the threshold is the group's advantage."""
    options = SIGNALS.get("extremes")(std="none", best=1, worst=1, branch=3, least=1.5)
    state = options.begin({"a": RewardConfig(scorer="x")})
    (kept,) = advantages_of(state.step([scored(a=[4, 1, 9, 2, 3, 5])]))
    # The second branch's worst take is 2 below the group's mean of 4, its best one only 1 above.
    np.testing.assert_allclose(kept, np.array([0, -3, 5, -2, 0, 0]) * 2)  # 6 takes, 3 of which train
    (none,) = advantages_of(state.step([scored(a=[4, 4, 4, 4, 4, 5])]))
    assert not none.any() and np.isfinite(none).all()
    branches = tiny.config(tiny.Path("unused"), step={"takes": 6}, sampler={"same_initial_noise": 3})
    options.check(branches)
    with pytest.raises(ConfigError, match=r"sampler.same_initial_noise=3 \(found true\)"):
        options.check(tiny.config(tiny.Path("unused"), step={"takes": 6}, sampler={"same_initial_noise": True}))
    with pytest.raises(ConfigError, match="are more than signal.branch \\(3\\)"):
        SIGNALS.get("extremes")(best=2, worst=2, branch=3).check(branches)
