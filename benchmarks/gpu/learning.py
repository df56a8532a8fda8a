"""Whether a shipped generator learns on this device: held-out rewards before and after some steps, in two dtypes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.gpu.card import Card
from benchmarks.learning.samples import CONFIGS, ROOT, Loop
from pipeline.config.load import load_config
from pipeline.core.statistics import estimate_of_means

# What holds for two CPU cores only, and GRPO on log-probs, whose ratio shows what a dtype does to replay.
_OVERRIDES = [
    "generator.compile=false", "learner.replicas=1", "learner.micro_batch=0", "rollout.batch=0",
    "objective={name: grpo_guard, kl_beta: 0}", "sampler={steps: 8, timestep_fraction: 1, same_initial_noise: true}",
]  # fmt: skip


def learning(kind: str, dtype: str, card: Card) -> dict[str, Any]:
    """`kind`: image or video. Some steps of GRPO; `replay` is the largest gap between replay and rollout of any step,
    and of the first one, which is strictly on-policy."""
    overrides = [*_OVERRIDES, f"generator.dtype={dtype}"]
    overrides.append(f"learner.autocast={'none' if dtype == 'float32' else dtype}")
    if card.tiny:
        overrides += ["evaluation.prompts=4", "evaluation.takes_per_prompt=1", "step.groups=1", "step.takes=4"]
    cfg = load_config(ROOT / CONFIGS[kind], overrides)
    loop = Loop(cfg, card.device)
    before = loop.evaluate()["rewards"]
    gaps, seconds = [], []
    key = loop.learner.objective.requirements.replay_metric
    for number in range(1 if card.tiny else 16):
        began = time.perf_counter()
        gaps.append(loop.step(number)[key])
        seconds.append(time.perf_counter() - began)
    after = loop.evaluate()["rewards"]
    rises = {}
    for name in before:
        rise = estimate_of_means(np.subtract(after[name], before[name]))
        rises[name] = {"before": float(np.mean(before[name])), "after": float(np.mean(after[name])), "se": rise.se}
    takes = loop.group * cfg.step.takes
    return {
        "rewards": rises,
        "takes": takes,
        "takes_per_s": takes / len(seconds) / float(np.median(seconds)),
        "replay_metric": key,
        "replay_first": gaps[0],
        "replay_max": max(gaps),
        "overrides": overrides,
    }
