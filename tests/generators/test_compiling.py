"""Compiled denoiser blocks: the same takes and training to rounding; machines that cannot compile run eagerly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from rank_batches import PROMPT, batches

from pipeline.config.schema import Config
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.tensors import unpack
from pipeline.generators.load.blocks import repeated_blocks
from pipeline.generators.load.compiling import compile_blocks, private_folder
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import train_work

ROOT = Path(__file__).parents[2]
CASES = {
    "full": {
        "trainable": {"kind": "full"},
        "objective": {"name": "awm", "kl_beta": 0.1},
        "step": {"groups": 2},
        "learner": {"replicas": 2},
    },
    "lora": {"step": {"groups": 1}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_compiled_rollout_and_training_are_the_plain_ones(tiny_wan, name):
    results = []
    for compiled in (False, True):
        cfg = tiny.config(tiny_wan, optimizer={"lr": 1e-3, "eps": 1e-2}, **CASES[name])
        cfg = cfg.model_copy(update={"generator": cfg.generator.model_copy(update={"compile": compiled})})
        policy = Policy.load(cfg, "cpu", threads=1)
        policy.probe()
        policy.add_adapters()
        media, trajectory, _ = policy.rollout(train_work(cfg, 0, 0, PROMPT))
        learner = Learner(cfg, "cpu")
        copies = [lane.modules for lane in learner.replicas] + [lane.frozen or {} for lane in learner.replicas]
        denoisers = [policy.pipe.transformer, *(copy["transformer"] for copy in copies if copy)]
        blocks = [block for denoiser in denoisers for block in repeated_blocks(denoiser).values()]
        assert all((block._compiled_call_impl is not None) == compiled for block in blocks) and blocks
        metrics = [learner.train_step(groups) for groups in batches(cfg, 2)]
        results.append((media, trajectory, metrics, learner.weights()))
    (media, trajectory, metrics, weights), (other_media, other_trajectory, other_metrics, other_weights) = results
    assert np.abs(media.frames.astype(int) - other_media.frames).max() <= 1
    final, other = (t.parts[0].final.data for t in (trajectory, other_trajectory))
    np.testing.assert_allclose(other, final, rtol=1e-4, atol=1e-5)
    gap = next(key for key in metrics[0] if key.startswith("onpolicy/"))
    assert other_metrics[0][gap] < 1e-5
    for mine, theirs in zip(metrics, other_metrics, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {gap}:
            rounding = 1e-3 if key.endswith("correlation") else 1e-5  # a quotient of what is nearly zero
            assert theirs[key] == pytest.approx(mine[key], rel=1e-3, abs=rounding), key
    for key, packed in weights.tensors.items():
        np.testing.assert_allclose(unpack(other_weights.tensors[key]), unpack(packed), rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_machine_without_a_compiler_runs_eagerly_and_says_so(tmp_path):
    script = (
        "import logging, torch; logging.basicConfig();"
        "from pipeline.generators.load.compiling import compile_blocks;"
        "stack = torch.nn.ModuleDict({'blocks': torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])});"
        "assert compile_blocks({'transformer': stack}, torch.device('cpu')) == 0;"
        "print(stack['blocks'][0](torch.ones(1, 2)).shape)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert "torch.Size([1, 2])" in done.stdout
    assert "generator.compile: this machine cannot" in done.stderr and "/nowhere/g++" in done.stderr


@pytest.mark.slow
def test_a_model_without_blocks_is_refused():
    with pytest.raises(UnsupportedPolicyError, match=r"transformer \(Linear\) has no blocks"):
        compile_blocks({"transformer": torch.nn.Linear(2, 2)}, torch.device("cpu"))


def test_compiled_code_is_kept_only_where_nobody_else_can_write(tmp_path):
    shared, own = tmp_path / "shared", tmp_path / "deep" / "own"
    shared.mkdir()
    shared.chmod(0o777)
    (tmp_path / "file").write_text("")
    assert private_folder([shared, tmp_path / "file" / "x", own]) == own
    assert own.stat().st_mode & 0o777 == 0o700
    assert private_folder([shared]) is None


def test_compiling_and_moving_single_layers_is_refused():
    base = tiny.config(Path("sd3")).model_dump(mode="json")
    with pytest.raises(ValueError, match="generator.compile: not with generator.offload group"):
        Config.model_validate({**base, "generator": {**base["generator"], "compile": True, "offload": "group"}})
