"""One group through rollout, hand-over of weights and update, in one process: times, memory and the replay check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.card import Card
from pipeline.config.schema import Config
from pipeline.core.prompts import load_prompts
from pipeline.core.types import Feedback, GroupBatch, Trajectory
from pipeline.generators.policy import Policy
from pipeline.generators.replay.replayer import Replayer
from pipeline.learner.distributed import DistributedContext
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import train_work


@dataclass
class MeasuredGroup:
    """A policy and a learner that have handled one group, and what was measured (`numbers`)."""

    policy: Policy
    learner: Learner
    trajectory: Trajectory
    numbers: dict[str, Any]


def measure_group(cfg: Config, card: Card, distributed: DistributedContext | None = None) -> MeasuredGroup:
    """`numbers`: seconds of a group's rollout, of its update and of the hand-over of weights between them, peaks in
    GiB of each role by itself, and the metric of the replay check. A warm-up is not counted."""
    prompt = load_prompts(cfg.prompts.train)[0]
    numbers: dict[str, Any] = {}
    policy: Policy | None = None

    def load() -> None:
        nonlocal policy
        policy = Policy.load(cfg, card.device)
        policy.probe([prompt])
        policy.add_adapters()

    load_peak = card.peak_gib(load)
    assert policy is not None
    drawing = policy
    work = train_work(cfg, 0, 0, prompt, grid=policy.grid)
    trajectory = policy.rollout(work).trajectory  # compiles, where the config says so
    assert trajectory is not None
    rollout_peak = card.peak_gib(lambda: drawing.rollout(work))
    if rollout_peak is not None and load_peak is not None:
        numbers["rollout_peak_gib"] = max(rollout_peak, load_peak)
    before = card.memory_gib()
    learner = Learner(cfg, card.device, distributed)
    batch = [
        GroupBatch(
            trajectory=trajectory, feedback=Feedback(advantages=np.linspace(-1, 1, work.takes).astype(np.float32))
        )
    ]
    weights = learner.weights()
    policy.load_weights(weights)
    numbers["push_s"] = card.seconds(lambda: drawing.load_weights(learner.weights()))
    numbers["push_mib"] = sum(packed.data.nbytes for packed in weights.tensors.values()) / 2**20
    first = learner.train_step(batch)
    key = learner.objective.requirements.replay_metric
    numbers["replay_metric"], numbers["replay"] = key, first.get(key)
    learn_peak = card.peak_gib(lambda: learner.train_step(batch))
    if learn_peak is not None and before is not None:
        numbers["learner_peak_gib"] = learn_peak - before
    numbers["takes"] = work.takes
    numbers["rollout_s"] = card.seconds(lambda: drawing.rollout(work))
    numbers["learn_s"] = card.seconds(lambda: learner.train_step(batch))
    return MeasuredGroup(policy, learner, trajectory, numbers)


def bare_passes(group: MeasuredGroup, card: Card) -> dict[str, float]:
    """Seconds and floating-point operations of one call of the denoiser with the takes of a part, without gradients
    and with, on the recorded inputs: what no implementation can do without."""
    part, spec = group.trajectory.parts[0], group.trajectory.spec
    takes = slice(0, part.stop - part.start)

    def output(modules: Any) -> torch.Tensor:
        replayer = Replayer(part, spec, modules, group.policy.device)
        sample, _ = replayer.samples(0, takes)
        with torch.autocast(card.device, dtype=torch.bfloat16):
            return replayer.model_output(0, takes, sample)

    def forward() -> None:
        with torch.no_grad():
            output(group.policy.modules)

    def forward_backward() -> None:
        output(group.learner.modules).square().mean().backward()
        group.learner.optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counted:
        forward()
    return {
        "takes": float(takes.stop),
        "forward_s": card.seconds(forward),
        "forward_backward_s": card.seconds(forward_backward),
        "forward_tflop": counted.get_total_flops() / 1e12,
    }
