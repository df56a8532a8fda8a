"""DPO and rejection sampling on one's own takes: values at the reference, gradients, signals, and a toy that learns."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from objective_terms import objective
from scored_groups import advantages_of, scored
from toy_flow import GRID, Flow, ode_reward, reward

from pipeline.config.parts import SIGNALS
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError
from pipeline.core.types import Feedback, GroupBatch, PromptItem
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import train_work
from pipeline.rl.objectives import objective_of
from pipeline.rl.objectives.micro_batch import Pairs
from pipeline.rl.recipe import check_recipe
from pipeline.rl.samplers import transition


class Rows(SimpleNamespace):
    """A micro-batch of given outputs."""

    def clean(self):
        return self.x0

    def fresh_noise(self):
        return self.sigma, self.eps

    def noised(self, x0, sigma, noise):
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0, sigma, noise):
        return noise - x0

    def output(self, x):
        return self.policy(x)

    def reference_output(self, x):
        with torch.no_grad():
            return self.reference(x)

    def replay_error(self):
        return None


def pairs(*entries, weights=None) -> Pairs:
    better, worse = torch.tensor(entries).T
    return Pairs(better, worse, torch.ones(len(entries)) if weights is None else torch.tensor(weights))


def rows(takes: int = 3, **values) -> tuple[Rows, torch.Tensor]:
    """The policy's output is the reference's plus `shift` [takes, 4], the leaf."""
    torch.manual_seed(0)
    shift = torch.zeros(takes, 4, requires_grad=True)
    base = torch.randn(takes, 4)
    micro = Rows(
        x0=torch.randn(takes, 4), eps=torch.randn(1, 4).expand(takes, 4), sigma=torch.tensor(0.5),
        policy=lambda x: base + shift, reference=lambda x: base, **values,
    )  # fmt: skip
    return micro, shift


def test_at_the_reference_the_loss_is_log_2_and_a_swapped_pair_turns_the_gradient_round():
    micro, shift = rows(pairs=pairs((0, 2)))
    loss = objective("dpo", beta=2.0).loss(micro)
    assert float(loss.total.mean()) == pytest.approx(math.log(2))
    loss.total.mean().backward()
    swapped, other = rows(pairs=pairs((2, 0)))
    objective("dpo", beta=2.0).loss(swapped).total.mean().backward()
    assert torch.allclose(shift.grad, -other.grad) and shift.grad[0].any() and not shift.grad[1].any()
    error = 2 * (micro.policy(None) - (micro.eps - micro.x0)).detach() / 4
    assert torch.allclose(shift.grad[0], 2.0 / 4 * error[0], atol=1e-6)  # beta / 4 grad M of the better take


def test_the_mean_over_takes_is_the_mean_over_pairs():
    micro, shift = rows(pairs=pairs((0, 1), (0, 2), weights=[0.5, 1.5]))
    shift.data += torch.randn(3, 4)
    loss = objective("dpo", beta=1.0).loss(micro)
    target = micro.eps - micro.x0
    change = (micro.policy(None) - target).pow(2).mean(1) - (micro.reference(None) - target).pow(2).mean(1)
    margins = -0.5 * (change[0] - change[[1, 2]])
    expected = -(torch.tensor([0.5, 1.5]) * torch.nn.functional.logsigmoid(margins)).mean()
    assert float(loss.total.mean()) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss.logs["dpo/accuracy"].mean()) == pytest.approx(float((margins > 0).float().mean()))


def test_the_worse_take_is_raised_too_where_the_other_policy_denoises_the_better_one_better():
    for moved_away in (False, True):
        micro, shift = rows(pairs=pairs((0, 2)))
        error = (micro.policy(None) - (micro.eps - micro.x0)).detach()
        shift.data[0] = (0.1 if moved_away else -0.1) * error[0]
        grads = {}
        for flip in (False, True):
            loss = objective("dpo", beta=2.0, flip=flip).loss(micro)
            (grads[flip],) = torch.autograd.grad(loss.total.mean(), shift)
        assert loss.logs["dpo/flipped"].mean() == float(moved_away)
        if not moved_away:
            assert torch.equal(grads[True], grads[False])
            continue
        change = (micro.policy(None) - (micro.eps - micro.x0)).pow(2).mean(1) - error.pow(2).mean(1)
        expected = -torch.nn.functional.logsigmoid(-(change[0] + change[2]))
        assert float(loss.total.mean()) == pytest.approx(float(expected), rel=1e-5)
        assert (grads[True][2] * grads[False][2] < 0).all() and (grads[True][0] * grads[False][0] > 0).all()


def test_better_takes_are_imitated_besides():
    micro, shift = rows(pairs=pairs((0, 2)))
    plain, both = (objective("dpo", beta=2.0, similarity=weight).loss(micro) for weight in (0.0, 0.3))
    error = (micro.policy(None) - (micro.eps - micro.x0)).pow(2).mean(1)
    assert float((both.total - plain.total).mean()) == pytest.approx(0.3 * float(error[0]), rel=1e-5)
    assert objective("dpo", similarity=0.3).terms == {"dpo_loss": 1.0, "similarity": 0.3}
    assert float(both.logs["similarity"].mean()) == pytest.approx(float(error[0]), rel=1e-5)


def test_an_earlier_policy_is_compared_with_and_replaced_after_every_nth_step(tiny_sd3):
    cfg = tiny.config(
        tiny_sd3, objective={"name": "dpo", "old_every": 2}, signal={"name": "pairs"}, optimizer={"lr": 1e-3}
    )
    assert objective_of(cfg).requirements.rollout_policy == "old" and not objective_of(cfg).requirements.reference_every
    policy, learner = Policy.load(cfg, "cpu", threads=1), Learner(cfg, "cpu")
    policy.probe()
    policy.add_adapters()
    policy.load_weights(learner.weights("old"))
    trajectory = policy.rollout(train_work(cfg, 0, 0, PromptItem(index=0, text="a red circle")))[1]
    feedback = Feedback(pairs=np.array([[2, 0], [1, 3]]), pair_weights=np.ones(2, np.float32))
    batch = [GroupBatch(trajectory=trajectory, feedback=feedback)]
    start = learner.weights("old").checksum
    losses = []
    for kept in (True, False, True):
        before = learner.weights("old").checksum
        metrics = learner.train_step(batch)
        assert (learner.weights("old").checksum == before) is kept
        assert metrics["onpolicy/max_abs_gap"] == 0.0 or before != start
        losses.append(metrics["dpo_loss"])
    assert losses[0] == pytest.approx(math.log(2)) and losses[1] < math.log(2) - 1e-6
    assert losses[2] == pytest.approx(math.log(2)), "the earlier policy is the trained one again"


def test_pairs_of_a_group():
    def made(**options):
        return SIGNALS.get("pairs")(**options).begin({"a": RewardConfig(scorer="x")})

    group = scored(a=[3, 1, 4, 1])
    (best,) = made().step([group]).feedback
    assert best.pairs.tolist() == [[2, 3]] and best.pair_weights.tolist() == [1]
    (every,) = made(choose="all", weigh="gap").step([group]).feedback
    assert every.pairs.tolist() == [[2, 0], [2, 1], [2, 3], [0, 1], [0, 3]], "equal takes are no pair"
    np.testing.assert_allclose(every.pair_weights, np.array([1, 3, 3, 2, 2]) / 2.2, rtol=1e-6)
    assert len(made(choose="all", margin=2.5).step([group]).feedback[0].pairs) == 2
    assert made().is_flat(scored(a=[2, 2, 2])) and made(margin=5).is_flat(group) and not made().is_flat(group)


def test_the_best_takes_are_kept():
    state = SIGNALS.get("select")(keep=2).begin({"a": RewardConfig(scorer="x")})
    assert advantages_of(state.step([scored(a=[3, 1, 4, 1])]))[0].tolist() == [2, 0, 2, 0]
    with pytest.raises(ConfigError, match="signal.keep: found 4; expected less than step.takes"):
        SIGNALS.get("select")(keep=4).check(tiny.config(tiny.Path("unused")))


@pytest.mark.parametrize("name", ["dpo", "rejection"])
def test_a_toy_learns_and_unlearns(name):
    def train(sign: float) -> Flow:
        torch.manual_seed(0)
        model, start = Flow(), Flow()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        signal = SIGNALS.get("pairs" if name == "dpo" else "select")(**({} if name == "dpo" else {"keep": 8}))
        state = signal.begin({"r": RewardConfig(scorer="x")})
        for _ in range(40):
            with torch.no_grad():
                x = torch.randn(64, 2)
                for t, t_next in zip(GRID, GRID[1:], strict=False):
                    x = transition("ode", 0.0, "flow", x, model(x, t), t, t_next, GRID[1]).mean
            (taught,) = state.step([scored(r=sign * np.asarray(reward(x)))]).feedback
            optimizer.zero_grad()
            for t in GRID[:-1]:
                micro = Rows(
                    x0=x, eps=torch.randn(1, 2).expand_as(x), sigma=torch.tensor(t), advantages=None,
                    policy=lambda noised, t=t: model(noised, t), reference=lambda noised, t=t: start(noised, t),
                )  # fmt: skip
                if name == "dpo":
                    micro.pairs = pairs(*taught.pairs.tolist())
                    total = objective("dpo", beta=2.0).loss(micro).total
                else:
                    error = (micro.policy(micro.noised(x, t, micro.eps)) - (micro.eps - x)).pow(2).mean(1)
                    total = torch.from_numpy(taught.advantages) * error
                (total.mean() / (len(GRID) - 1)).backward()
            optimizer.step()
        return model

    before = ode_reward(Flow())
    assert ode_reward(train(1.0)) > before + 0.2
    assert ode_reward(train(-1.0)) < before - 0.2


RECIPE = {"objective": {"name": "dpo"}, "signal": {"name": "pairs"}, "optimizer": {"lr": 1e-3}}


def test_it_trains_a_pipeline(tiny_sd3):
    cfg = tiny.config(tiny_sd3, **RECIPE)
    check_recipe(cfg)
    policy, learner = Policy.load(cfg, "cpu", threads=1), Learner(cfg, "cpu")
    policy.probe()
    policy.add_adapters()
    policy.load_weights(learner.weights())
    trajectory = policy.rollout(train_work(cfg, 0, 0, PromptItem(index=0, text="a red circle")))[1]
    feedback = Feedback(pairs=np.array([[2, 0], [1, 3]]), pair_weights=np.ones(2, np.float32))
    batch = [GroupBatch(trajectory=trajectory, feedback=feedback)]
    first = learner.train_step(batch)
    assert first["dpo_loss"] == first["loss"] == pytest.approx(math.log(2)) and first["onpolicy/max_abs_gap"] == 0.0
    joined = Learner(tiny.config(tiny_sd3, **RECIPE, learner={"micro_batch": 8}), "cpu")
    assert joined.train_step(batch)["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4), "two levels in a call"
    history = [learner.train_step(batch) for _ in range(3)]
    assert joined.train_step(batch)["dpo/margin"] == pytest.approx(history[0]["dpo/margin"], rel=1e-3)
    assert history[-1]["dpo_loss"] < math.log(2) and history[-1]["dpo/accuracy"] == 1.0
    with pytest.raises(ConfigError, match="signal.name: advantages gives advantages, and objective dpo needs pairs"):
        check_recipe(tiny.config(tiny_sd3, objective={"name": "dpo"}))
