"""The gradient's signal by step: found where it was put, and zero where there is none."""

from __future__ import annotations

import pytest
import tiny
import torch

from benchmarks.learning.gradient_signal import _Moments, gradients, summary
from benchmarks.learning.samples import Loop

SIZE, GROUPS = 4000, 40


def test_the_signal_that_was_put_in_is_found():
    """Step 0: noise of variance 1 and a common part of 0.5 a parameter; step 1: noise ten times as large, no signal."""
    generator = torch.Generator().manual_seed(0)
    moments = {0: _Moments(), 1: _Moments()}
    for group in range(GROUPS):
        noise = torch.randn(2, SIZE, generator=generator)
        moments[0].add(noise[0] + 0.5, group % 2)
        moments[1].add(10.0 * noise[1], group % 2)
    first, second, both = summary(moments, GROUPS)
    assert [first["step"], second["step"], both["step"]] == ["0", "1", "all"]
    assert first["signal"] == pytest.approx(0.25 / 1.25, rel=0.1)
    assert first["cosine"] == pytest.approx(0.25 / (0.25 + 1 / 20), abs=0.03)
    assert abs(second["cosine"]) < 0.06 and abs(second["signal"]) < 0.005
    assert second["share"] == pytest.approx(100 / 101.25, abs=0.01)
    assert both["cosine"] < first["cosine"]  # the other step's noise hides it


def test_a_step_s_gradient_is_that_of_its_transitions(tiny_sd3, tmp_path):
    """The steps' gradients sum up to the update's."""
    (tmp_path / "own.py").write_text("def bright(frames, prompt):\n    return float(frames.mean()) / 255\n")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    cfg = tiny.config(
        tiny_sd3,
        trainable={"kind": "full"},
        prompts={"train": str(tmp_path / "prompts.txt")},
        sampler={"steps": 6},
        step={"takes": 4, "groups": 1},
    )
    rewards = {"bright": {"scorer": f"{tmp_path / 'own.py'}:bright"}}
    loop = Loop(type(cfg).model_validate({**cfg.model_dump(), "rewards": rewards}))
    (batch,) = loop.draw(0)
    apart = gradients(loop, batch)
    assert set(apart) == {0, 1, 2, 3}
    replica = loop.learner.replicas[0]
    for parameter in replica.parameters.values():
        parameter.grad = None
    for call in replica.micro_batches(batch.held, 0):
        replica.loss(batch, call, False).total.sum().backward()
    together = torch.cat([p.grad.flatten() for p in replica.parameters.values() if p.grad is not None])
    assert torch.allclose(sum(apart.values()), together, atol=1e-6 * float(together.abs().max()))
