"""Objective contrastive: its loss on made-up takes, and what it needs of source and learner."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from objective_terms import objective

from pipeline.core.errors import ConfigError
from pipeline.rl.objectives.micro_batch import Denoised
from pipeline.rl.recipe import check_recipe

TAKES = 3


class Takes(SimpleNamespace):
    """The error of take i under prompt j is errors[i, j] times the mean square of its noise."""

    def clean(self):
        return torch.zeros(TAKES, 4)

    def noise_of_takes(self):
        return self.noise

    def denoise(self, number, x0, noise, conditions=None):
        assert number == 0
        rows = torch.arange(TAKES)
        return Denoised(self.errors[rows, torch.tensor(conditions)] * noise.pow(2).mean(1), x0)


def takes() -> Takes:
    torch.manual_seed(0)
    return Takes(noise=torch.randn(TAKES, 4), errors=torch.rand(TAKES, TAKES).requires_grad_())


def test_the_loss_is_cross_entropy_of_the_own_prompt_under_one_noise():
    micro = takes()
    loss = objective("contrastive", scale=3.0, temperature=0.5, denoising=0.25).loss(micro)
    errors = micro.errors * micro.noise[0].pow(2).mean()  # the same noise for all
    logits = 3.0 * torch.exp(-errors / 0.5)
    own = logits.diagonal() - logits.exp().sum(1).log()
    assert torch.allclose(loss.total, -own + 0.25 * errors.diagonal(), rtol=1e-5)
    assert torch.allclose(loss.logs["contrastive"], -own, rtol=1e-5)
    assert torch.equal(loss.logs["accuracy"], (errors.argmin(1) == torch.arange(TAKES)).float())
    (gradient,) = torch.autograd.grad(loss.logs["contrastive"].sum() * 0 + loss.total.sum(), micro.errors)
    off = ~torch.eye(TAKES, dtype=torch.bool)
    assert (gradient.diagonal() > 0).all() and (gradient[off] < 0).all()  # own error falls, the others' rise


def test_it_needs_takes_of_several_prompts_in_one_call(tmp_path):
    source = {"name": "clips", "noise": 0.0, "distinct": True}
    parts = {"signal": {"name": "none"}, "objective": {"name": "contrastive"}}
    check_recipe(tiny.config(tmp_path, source=source, **parts))
    with pytest.raises(ConfigError, match="contrastive compares the prompts of a group, .*distinct: true"):
        check_recipe(tiny.config(tmp_path, source={**source, "distinct": False}, **parts))
    with pytest.raises(ConfigError, match="rollout.batch: found 2; objective contrastive compares all takes"):
        check_recipe(tiny.config(tmp_path, source=source, rollout={"batch": 2}, **parts))
    rng = np.random.default_rng(0)
    assert {tuple(objective("contrastive").tail_steps(3, rng, rng)) for _ in range(50)} == {(0,), (1,), (2,)}
