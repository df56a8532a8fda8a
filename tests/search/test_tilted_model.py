"""Searches that draw from the tilted model p(x) exp(lambda r(x)) do so, on a model where it is known."""

from __future__ import annotations

from typing import ClassVar

import mixture_walk
import numpy as np
import pytest
from mixture_walk import STEPS, MixtureWalk, found, tilted

from pipeline.core.errors import ConfigError
from pipeline.search.base import SEARCHES, Found, Task
from pipeline.search.methods.dts import TreeSampling, child_shares, soft_value
from pipeline.search.methods.fk import FkSteering, Potentials, resample
from pipeline.search.run import run_searches

LAMBDA = 0.7  # moves the upper mode's share from 0.30 to 0.63


def standard_errors(values: np.ndarray, strength: float) -> tuple[float, float]:
    """How far mean and share of the upper mode are from the tilted model's."""
    mean, share = tilted(strength)
    upper = values > 0
    return (
        (values.mean() - mean) / (values.std(ddof=1) / np.sqrt(len(values))),
        (upper.mean() - share) / np.sqrt(share * (1 - share) / len(values)),
    )


def test_the_walk_draws_the_mixture():
    plain = found(SEARCHES.get("best-of-n")(passes=1), 1000)
    assert max(np.abs(standard_errors(plain, 0.0))) < 3


def fk(potential: str, **options) -> FkSteering:
    return FkSteering(passes=40, at=[1, 3], potential=potential, strength=LAMBDA, pick="drawn", **options)


@pytest.mark.parametrize("potential", ["diff", "max", "add", "rt"])
@pytest.mark.parametrize("options", [{}, {"ess": 0.5, "resampling": "multinomial"}], ids=["always", "ess"])
def test_fk_draws_from_the_tilted_model(potential, options):
    assert max(np.abs(standard_errors(found(fk(potential, **options), 100), LAMBDA))) < 3


def test_a_wrong_weight_is_seen(monkeypatch):
    """As above, with a last potential that forgets the ones before."""

    def forgetful(self: Potentials, rewards: np.ndarray) -> None:
        self.log_weights = self.log_weights + self.strength * rewards

    monkeypatch.setattr(Potentials, "finish", forgetful)
    assert max(np.abs(standard_errors(found(fk("add"), 100), LAMBDA))) > 3


class WholeTree(TreeSampling):
    """Returns no take, but keeps the tree's mean over the tilted model and its share of the upper mode."""

    name = "whole tree"
    means: ClassVar[list[np.ndarray]] = []

    def search(self, task: Task):
        tree = yield from self.grow(task)
        leaves = [(leaf.particle.x, share) for leaf, share in tree.leaves(self.strength)]
        self.means.append(np.array([(x * share, (x > 0) * share) for x, share in leaves]).sum(0))
        return Found(tree.particle, 0.0)


def tree_errors(trees: int = 16) -> np.ndarray:
    """How far the mean over trees is from the tilted model's, in standard errors: (mean, share of the upper mode)."""
    WholeTree.means.clear()
    search = WholeTree(passes=120, strength=LAMBDA, at=[0, 2])
    run_searches(search, [Task(steps=STEPS, noisy=tuple(range(STEPS)), seed=i) for i in range(trees)], MixtureWalk())
    off = np.array(WholeTree.means) - tilted(LAMBDA)
    return off.mean(0) / (off.std(0, ddof=1) / np.sqrt(trees))


def test_dts_draws_from_the_tilted_model():
    assert max(np.abs(tree_errors())) < 3


def test_a_wrong_share_is_seen(monkeypatch):
    """Children in proportion to exp(value), without lambda."""
    monkeypatch.setattr("pipeline.search.methods.dts.child_shares", lambda node, _: child_shares(node, 1.0))
    assert max(np.abs(tree_errors())) > 3


def test_a_nodes_value_is_that_of_its_children_on_average():
    values = np.array([0.3, -0.2, 1.1])
    assert np.isclose(np.exp(2.0 * soft_value(values, 2.0)), np.exp(2.0 * values).mean())
    assert np.isclose(soft_value(values, 0.0), values.mean()) and np.isclose(soft_value(values, 1e-6), values.mean())


@pytest.mark.parametrize("name", ["best-of-n", "fk", "dts", "dts-star", "stepwise"])
def test_more_passes_find_better_takes_within_the_budget(name):
    means = []
    for passes in (1, 4, 16):
        walk = MixtureWalk()
        tasks = [Task(steps=STEPS, noisy=tuple(range(STEPS)), seed=i) for i in range(50)]
        best = run_searches(SEARCHES.get(name)(passes=passes), tasks, walk)
        assert all(0 < task.trace.calls <= passes * STEPS for task in tasks)
        assert walk.rows == sum(task.trace.calls for task in tasks)
        assert all(
            max(n.score for n in t.trace.nodes if n.level == STEPS) == f.score for t, f in zip(tasks, best, strict=True)
        )
        means.append(np.mean([f.score for f in best]))
    assert means[0] + 0.3 < means[1] and means[1] + 0.1 < means[2]


@pytest.mark.parametrize("name", ["fk", "dts", "dts-star"])
def test_without_strength_or_choice_a_search_is_plain_sampling(name):
    plain = found(SEARCHES.get("best-of-n")(passes=1), 50)
    options = {"passes": 1} if name == "fk" else {"passes": 8, "children": 1}
    assert np.array_equal(found(SEARCHES.get(name)(**options), 50), plain)


def test_offspring_are_in_proportion():
    rng, shares = np.random.default_rng(0), np.array([0.55, 0.05, 0.3, 0.1])
    for scheme in ("systematic", "multinomial"):
        counts = np.mean([np.bincount(resample(shares, rng, scheme), minlength=4) for _ in range(4000)], 0)
        assert np.allclose(counts, 4 * shares, atol=0.06)
    equal = np.full(7, 1 / 7)
    assert all(np.array_equal(resample(equal, rng, "systematic"), np.arange(7)) for _ in range(50))


def test_the_best_so_far_is_kept_at_any_time():
    (task,) = tasks = [Task(steps=STEPS, noisy=tuple(range(STEPS)), seed=3)]
    (best,) = run_searches(SEARCHES.get("dts-star")(passes=20), tasks, MixtureWalk())
    curve = task.trace.best_so_far(STEPS)
    assert curve[0][0] == STEPS and curve[-1][1] == best.score
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in zip(curve, curve[1:], strict=False))
    for node in task.trace.nodes:
        assert node.parent < 0 or task.trace.nodes[node.parent].level < node.level


@pytest.mark.parametrize("name", ["fk", "dts"])
def test_the_same_seed_finds_the_same_take(name):
    search = SEARCHES.get(name)(passes=8)
    alone = np.concatenate([found(search, 1, first=i) for i in range(5)])
    assert np.array_equal(found(search, 5), alone)
    assert not np.array_equal(found(search, 5, first=100), alone)


@pytest.mark.parametrize(
    ("name", "options", "noisy", "message"),
    [
        ("fk", {}, (), "sampler steps can draw noise"),
        ("dts", {}, (), "sampler steps can draw noise"),
        ("fk", {"at": [1, 4]}, (0, 1, 2), r"at: found \[1, 4\]; expected rising levels from 1 to 2"),
        ("dts", {"at": [2, 1]}, (0, 1, 2), "rising levels from 0 to 2"),
        ("fk", {}, (0,), "only step 0 draws noise"),
        ("stepwise", {"at": [0, 9]}, (), "rising levels from 0 to 4"),
    ],
)
def test_what_does_not_fit_the_sampler_is_refused(name, options, noisy, message):
    with pytest.raises(ConfigError, match=message):
        SEARCHES.get(name)(**options).check(Task(steps=mixture_walk.STEPS, noisy=noisy, seed=0))
