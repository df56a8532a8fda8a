"""Preferences between drawn trajectories: values at the reference, gradients, clips, a toy that learns, a pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from objective_terms import objective
from scored_groups import scored
from toy_flow import GRID, Flow, ode_reward, reward

from pipeline.config.parts import SIGNALS
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError
from pipeline.core.types import GroupBatch, PromptItem
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.learner.micro_batch import micro_batch_specs
from pipeline.rl.group_plan import train_work
from pipeline.rl.objectives.micro_batch import Drawn, Pairs
from pipeline.rl.recipe import check_recipe
from pipeline.rl.samplers import log_prob, transition

METHODS = {
    "d3po": {"fit": "order", "beta": 0.1, "clip": 0.1},
    "prdp": {"fit": "gap", "beta": 3.0, "clip": 0.1},
    "rebel": {"fit": "gap", "against": "rollout", "beta": 3.0, "clip": 0.0},
}
TIMES = [(0.9, 0.8, 0.85), (0.6, 0.5, 0.85), (0.5, 0.3, 0.85)]


@dataclass
class Level:
    """One trained step of some takes. The policy's outputs are those of functions of x."""

    x: torch.Tensor
    x_next: torch.Tensor
    times: tuple[float, float, float]
    policy: object
    reference: object
    old_log_prob: torch.Tensor
    passes: int = 0  # of the policy

    def drawn(self) -> Drawn:
        return Drawn(self.x, self.x_next, self.old_log_prob, None)

    def transition(self, x, output):
        return transition("flow_sde", 0.7, "flow", x, output, *self.times)

    def log_prob_of(self, policy) -> torch.Tensor:
        return log_prob(self.x_next, self.transition(self.x, policy(self.x)))

    def output(self, x):
        self.passes += 1
        return self.policy(x)

    def reference_output(self, x):
        with torch.no_grad():
            return self.reference(x)


class Joined:
    """Rows of all levels one after another, as of one denoiser call; or (`whole`) all rows of every level."""

    def __init__(self, levels: list[Level], pairs: Pairs, whole: bool) -> None:
        self._levels, self._whole, takes = levels, whole, len(levels[0].x)
        shift = 0 if whole else takes
        self._rows = [slice(i * shift, i * shift + takes) for i in range(len(levels))]
        repeats = 1 if whole else len(levels)

        def repeated(values, step):
            return None if values is None else torch.cat([values + i * step for i in range(repeats)])

        self.pairs = Pairs(
            repeated(pairs.better, takes), repeated(pairs.worse, takes), repeated(pairs.weights, 0),
            repeated(pairs.gaps, 0),
        )  # fmt: skip

    def levels(self):
        return list(zip(self._rows, self._levels, strict=True))

    def output(self, x):
        return torch.cat([level.output(x[rows]) for rows, level in self.levels()])

    def reference_output(self, x):
        return torch.cat([level.reference_output(x[rows]) for rows, level in self.levels()])


def pairs_of(*entries, gaps=None, weights=None) -> Pairs:
    better, worse = torch.tensor(entries).T
    weights = torch.ones(len(entries)) if weights is None else torch.tensor(weights)
    return Pairs(better, worse, weights, None if gaps is None else torch.tensor(gaps))


def case(name: str, pairs: Pairs, moved: float = 0.0, drawn: float = 0.0, **options):
    """The objective's loss of three takes, and what it is made of. The policy's output is the reference's plus `moved`
    times a random vector; that of the policy that drew the takes, plus `drawn` times another one."""
    torch.manual_seed(1)
    levels, leaves = [], []
    for times in TIMES:
        base, away, before = torch.randn(3, 3, 16).unbind(0)
        x = torch.randn(3, 16)
        leaf = (base + moved * away).requires_grad_()
        old = transition("flow_sde", 0.7, "flow", x, base + drawn * before, *times)
        x_next = old.mean + old.std * torch.randn(3, 16)
        levels.append(
            Level(x, x_next, times, lambda _, leaf=leaf: leaf, lambda _, base=base: base, log_prob(x_next, old))
        )
        leaves.append(leaf)
    chosen = objective("trajectory_pairs", **{**METHODS[name], **options})
    whole = chosen.requirements.unit == "trajectory"
    loss = chosen.loss(Joined(levels, pairs, whole))
    # As published, with everything in one graph: log-ratios [steps, takes] to the reference.
    now = torch.stack([level.log_prob_of(level.policy) for level in levels])
    reference = torch.stack([level.log_prob_of(level.reference) for level in levels])
    snapshot = torch.stack([level.old_log_prob for level in levels])
    return loss, leaves, now, reference, snapshot


def gradients(loss, leaves):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, retain_graph=True)])


def test_d3po_is_log_2_at_the_reference_and_every_step_counts_by_itself():
    loss, leaves, *_ = case("d3po", pairs_of((0, 2)))
    assert loss.total.shape == (9,) and float(loss.total.detach().mean()) == pytest.approx(math.log(2))
    swapped, other, *_ = case("d3po", pairs_of((2, 0)))
    assert torch.allclose(gradients(loss.total.mean(), leaves), -gradients(swapped.total.mean(), other))
    assert gradients(loss.total.mean(), leaves).reshape(3, 3, 16)[:, [0, 2]].any(-1).all()

    loss, leaves, now, reference, _ = case("d3po", pairs_of((0, 2), (1, 2), weights=[0.5, 1.5]), moved=1.0, beta=2.0)
    rho = (now - reference).exp().clamp(0.9, 1.1)
    assert (rho == 1.1).any() or (rho == 0.9).any()
    margin = 2.0 * (rho.log()[:, [0, 1]] - rho.log()[:, [2, 2]])
    expected = -(torch.tensor([0.5, 1.5]) * torch.nn.functional.logsigmoid(margin)).mean()
    assert float(loss.total.mean()) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(gradients(loss.total.mean(), leaves), gradients(expected, leaves), atol=1e-7)
    share = ((now - reference).exp() - 1).abs() > 0.1
    assert float(loss.logs["clip/share"].mean()) == pytest.approx(float(share.float().mean()))


def test_rebel_regresses_the_sum_over_the_steps():
    gaps = [0.7, -0.2]
    loss, leaves, *_ = case("rebel", pairs_of((0, 2), (1, 2), gaps=gaps))
    assert loss.total.shape == (3,)
    assert float(loss.total.detach().mean()) == pytest.approx(np.square(gaps).mean()), "nothing has been learned yet"
    turned, others, *_ = case("rebel", pairs_of((0, 2), (1, 2), gaps=[-0.7, 0.2]))
    assert torch.allclose(gradients(loss.total.mean(), leaves), -gradients(turned.total.mean(), others))
    swapped, others, *_ = case("rebel", pairs_of((2, 0), (2, 1), gaps=gaps))
    assert torch.allclose(gradients(loss.total.mean(), leaves), -gradients(swapped.total.mean(), others))

    loss, leaves, now, _, snapshot = case("rebel", pairs_of((0, 2), (1, 2), gaps=gaps), moved=0.2, drawn=0.1)
    total = (now - snapshot).sum(0)
    expected = (3.0 * (total[[0, 1]] - total[[2, 2]]) - torch.tensor(gaps)).pow(2).mean()
    assert float(loss.total.mean()) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(gradients(loss.total.mean(), leaves), gradients(expected, leaves), rtol=1e-4, atol=1e-6)
    assert loss.replay_error.shape == (3, 3)


@pytest.mark.parametrize("drawn", [0.0, 0.3])
def test_prdp_holds_each_step_near_the_snapshot_and_takes_the_larger_loss(drawn):
    seen = set()
    for gap in (0.7, -0.7):
        pairs = pairs_of((0, 2), (1, 2), (0, 1), gaps=[gap, 2 * gap, gap / 2])
        loss, leaves, now, reference, snapshot = case("prdp", pairs, moved=0.3, drawn=drawn, clip=0.05)
        plain, held = now - reference, (snapshot - reference) + (now - snapshot).clamp(-0.05, 0.05)
        better, worse = pairs.better, pairs.worse
        squares = [
            (3.0 * (r.sum(0)[better] - r.sum(0)[worse]) - pairs.gaps).pow(2) for r in (plain, held)
        ]  # fmt: skip
        expected = torch.maximum(*squares).mean()
        seen |= set((squares[0] > squares[1]).tolist())
        assert float(loss.total.mean()) == pytest.approx(float(expected), rel=1e-5)
        assert torch.allclose(gradients(loss.total.mean(), leaves), gradients(expected, leaves), rtol=1e-4, atol=1e-6)
    assert seen == {True, False}, "both kinds of pair were seen"


def test_on_policy_the_clip_takes_nothing_of_the_gradient():
    pairs = pairs_of((0, 2), gaps=[0.5])
    (clipped, leaves, *_), (free, others, *_) = case("prdp", pairs), case("prdp", pairs, clip=0.0)
    assert torch.allclose(gradients(clipped.total.mean(), leaves), gradients(free.total.mean(), others))
    assert gradients(free.total.mean(), others).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="fit=gap needs pairs with reward gaps; set fit=order"):
        case("prdp", pairs_of((0, 2)))


def test_activations_of_a_step_are_computed_again_in_the_backward_pass():
    model = Flow()
    x = torch.randn(2, 2)
    policies = partial(_at, model, 0.9), partial(_at, model, 0.9)
    levels = [Level(x, x, times, *policies, torch.zeros(2)) for times in TIMES]
    loss = objective("trajectory_pairs", **METHODS["rebel"]).loss(Joined(levels, pairs_of((0, 1), gaps=[1.0]), True))
    assert [level.passes for level in levels] == [1, 1, 1]
    loss.total.sum().backward()
    assert [level.passes for level in levels] == [2, 2, 2]


@pytest.mark.parametrize("name", METHODS)
def test_a_toy_learns_and_unlearns(name):
    chosen = objective("trajectory_pairs", **METHODS[name])

    def train(sign: float) -> Flow:
        torch.manual_seed(0)
        model, start = Flow(), Flow()
        start.load_state_dict(model.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        state = SIGNALS.get("pairs")(choose="all").begin({"r": RewardConfig(scorer="x")})
        for _ in range(40):
            levels = []
            with torch.no_grad():
                x = torch.randn(24, 2)
                for t, t_next in list(zip(GRID, GRID[1:], strict=False)):
                    times = (t, t_next, GRID[1])
                    kind = "flow_sde" if t_next else "ode"
                    step = transition(kind, 0.7, "flow", x, model(x, t), *times)
                    x_next = step.mean + step.std * torch.randn_like(x)
                    if t_next:
                        policies = partial(_at, model, t), partial(_at, start, t)
                        levels.append(Level(x, x_next, times, *policies, log_prob(x_next, step)))
                    x = x_next
            (taught,) = state.step([scored(r=sign * np.asarray(reward(x)))]).feedback
            pairs = Pairs(
                *torch.from_numpy(taught.pairs).T, *map(torch.from_numpy, (taught.pair_weights, taught.pair_gaps))
            )
            optimizer.zero_grad()
            chosen.loss(Joined(levels, pairs, chosen.fit == "gap")).total.mean().backward()
            optimizer.step()
        return model

    before = ode_reward(Flow())
    assert ode_reward(train(1.0)) > before + 0.2
    assert ode_reward(train(-1.0)) < before - 0.2


def _at(model: Flow, t: float, x: torch.Tensor) -> torch.Tensor:
    return model(x, t)


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_a_pipeline(tiny_sd3, name):
    cfg = tiny.config(
        tiny_sd3,
        sampler={"kind": "flow_sde", "noise_level": 0.7, "window": {"range": [0, 2]}},
        objective={"name": "trajectory_pairs", **METHODS[name]},
        signal={"name": "pairs"},
        optimizer={"lr": 1e-3},
    )
    check_recipe(cfg)
    policy, learner = Policy.load(cfg, "cpu", threads=1), Learner(cfg, "cpu")
    policy.probe()
    policy.add_adapters()
    policy.load_weights(learner.weights())
    trajectory = policy.rollout(train_work(cfg, 0, 0, PromptItem(index=0, text="a red circle")))[1]
    specs = micro_batch_specs(cfg, trajectory)
    passes = [module for spec in specs for module in spec.modules]
    assert sum(spec.takes for spec in specs) == (4 if chosen_unit(cfg) == "trajectory" else 8)
    assert passes.count("reference") == (0 if name == "rebel" else 2) and passes.count("transformer") >= 2
    state = SIGNALS.get("pairs")().begin(cfg.rewards)
    result = state.step([scored(**{reward: [0.1, 0.9, 0.5, 0.3] for reward in cfg.rewards})])
    batch = [GroupBatch(trajectory=trajectory, feedback=result.feedback[0])]
    first = learner.train_step(batch)
    gaps = result.feedback[0].pair_gaps
    assert first["onpolicy/max_abs_log_ratio"] < 1e-5 and first["grad_norm"] > 0 and first["clip/share"] == 0
    expected = math.log(2) if name == "d3po" else float((gaps**2).mean())
    assert first["pairs_loss"] == first["loss"] == pytest.approx(expected, rel=1e-4)
    history = [learner.train_step(batch) for _ in range(3)]
    assert history[-1]["loss"] < first["loss"] and history[-1]["pairs/accuracy"] == 1.0


def chosen_unit(cfg):
    return cfg.objective.requirements.unit


def test_all_takes_of_a_group_are_in_one_call_and_the_signal_gives_pairs():
    options = {"sampler": {"kind": "flow_sde"}, "objective": {"name": "trajectory_pairs"}}
    with pytest.raises(ValueError, match="clip: found 1; with fit=order set less than 1, or 0 for no clip"):
        tiny.config(tiny.Path("unused"), objective={"name": "trajectory_pairs", "clip": 1})
    with pytest.raises(ConfigError, match="signal.name: advantages gives advantages, and objective trajectory_pairs"):
        check_recipe(tiny.config(tiny.Path("unused"), **options))
    with pytest.raises(ConfigError, match=r"learner.micro_batch: found 3; .* set 0, or step.takes \(4\) or more"):
        check_recipe(tiny.config(tiny.Path("unused"), signal={"name": "pairs"}, learner={"micro_batch": 3}, **options))
