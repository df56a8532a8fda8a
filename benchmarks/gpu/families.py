"""Tiny random checkpoints of many pipelines, on this device in each dtype: probe, replay, one step of GRPO."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.card import Card
from benchmarks.learning.samples import ROOT
from pipeline.core.errors import one_line
from pipeline.core.types import Feedback, GroupBatch
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import train_work

DTYPES = ("float32", "bfloat16", "float16")


def families(card: Card, seconds: float) -> dict[str, Any]:
    """Family -> dtype -> the replay check's metric and the gradient's norm, or how it failed. Begins no other family
    once `seconds` have passed."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    import families as tested

    found: dict[str, Any] = {}
    began = time.monotonic()
    names = [name for name, family in tested.FAMILIES.items() if not family.slow]
    with tempfile.TemporaryDirectory() as root:
        for name in names[:2] if card.tiny else names:
            if time.monotonic() - began > seconds:
                found["not tried"] = names[names.index(name) :]
                break
            folder = tested.make(name, Path(root))
            found[name] = {dtype: _one_step(tested, name, folder, dtype, card) for dtype in DTYPES}
            card.free()
    return found


def _one_step(tested: Any, name: str, folder: Path, dtype: str, card: Card) -> dict[str, Any]:
    autocast = "none" if dtype == "float32" else dtype
    try:
        cfg = tested.config(name, folder, generator={"dtype": dtype}, learner={"autocast": autocast})
        prompts = tested.prompts(name, folder)
        policy = Policy.load(cfg, card.device, 1 if card.device == "cpu" else 0)
        policy.probe(prompts)
        policy.add_adapters()
        learner = Learner(cfg, card.device)
        policy.load_weights(learner.weights())
        work = train_work(cfg, 0, 0, prompts[0], grid=policy.grid)
        advantages = np.linspace(-1, 1, work.takes).astype(np.float32)
        trajectory = policy.rollout(work).trajectory
        metrics = learner.train_step([GroupBatch(trajectory=trajectory, feedback=Feedback(advantages=advantages))])
    except Exception as error:  # a family that fails here is a result
        return {"failed": f"{type(error).__name__}: {one_line(error, 300)}"}
    key = learner.objective.requirements.replay_metric
    return {key: metrics[key], "grad_norm": metrics["grad_norm"]}
