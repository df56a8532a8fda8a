"""Frozen int8 weights under a LoRA. Needs torchao (the extra `quantize`), else the LoRA test is skipped."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError
from scored_groups import group_batch

from pipeline.core.errors import ConfigError
from pipeline.core.types import PromptItem
from pipeline.generators.export import export_lora
from pipeline.generators.load.pipeline import load_denoisers
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import train_work
from pipeline.tools.preflight_generator import check_quantize

HAVE_TORCHAO = importlib.util.find_spec("torchao") is not None
RED = PromptItem(index=0, text="a red circle")


@pytest.mark.skipif(not HAVE_TORCHAO, reason="torchao is not installed")
def test_both_sides_round_alike_and_the_lora_trains(tiny_sd3, tmp_path):
    cfg = tiny.config(tiny_sd3, generator={"quantize": "int8"}, optimizer={"lr": 1e-2})
    policy, learner = Policy.load(cfg, "cpu", threads=1), Learner(cfg, "cpu")
    kinds = {type(p.data).__name__ for p in policy.modules["transformer"].parameters()}
    assert "Int8Tensor" in kinds
    policy.probe()
    policy.add_adapters()
    plain = Policy.load(tiny.config(tiny_sd3), "cpu", threads=1)
    plain.probe()
    for step in range(2):
        assert policy.load_weights(learner.weights()) == learner.weights().checksum
        media, trajectory, _ = policy.rollout(train_work(cfg, step, step, RED))
        if step == 0:
            gap = np.abs(plain.rollout(train_work(cfg, 0, 0, RED))[0].frames.astype(int) - media.frames)
            assert 0 < gap.max() < 60
        batch = group_batch(trajectory, [1, -1, 1, -1])
        metrics = learner.train_step([batch])
        assert metrics["onpolicy/max_abs_log_ratio"] == 0.0 and metrics["grad_norm"] > 0
    assert (export_lora(cfg, learner.weights(), tmp_path / "lora") / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.skipif(HAVE_TORCHAO, reason="torchao is installed")
def test_without_torchao_it_says_what_to_install(tiny_sd3):
    cfg = tiny.config(tiny_sd3, generator={"quantize": "int8"}).generator
    with pytest.raises(ConfigError, match="generator.quantize: int8 needs the package torchao"):
        load_denoisers(cfg, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("sections", [{"trainable": {"kind": "full"}}, {"rollout": {"merge_lora": True}}])
def test_what_it_does_not_go_with_is_refused(tiny_sd3, sections):
    with pytest.raises(ValidationError, match=r"generator.quantize: int8 .* not with"):
        tiny.config(tiny_sd3, generator={"quantize": "int8"}, **sections)


def test_it_is_noticed_before_anything_is_loaded(tiny_sd3, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"generator.quantize: int8 needs the package torchao; pip install"):
        check_quantize(tiny.config(tiny_sd3, generator={"quantize": "int8"}))
    check_quantize(tiny.config(tiny_sd3))
