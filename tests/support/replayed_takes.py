"""Takes of which every step is recorded, and how they are compared with the pipeline's own calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pipeline.core.types import PromptItem, Trajectory
from pipeline.generators.latent_map import LatentMap
from pipeline.generators.policy import Policy
from pipeline.generators.policy_pipeline import Sampled
from pipeline.generators.record.packing import pack_recording
from pipeline.generators.record.recording import RawStep, RecordOptions
from pipeline.generators.replay.chain import DenoisingChain
from pipeline.generators.replay.replayer import Replayer
from pipeline.learner.tail import ReplayedTail
from pipeline.rl.group_plan import ode_sampling


class Drawn:
    """Takes of one pipeline call with every step recorded, and what the learner replays of them."""

    def __init__(self, policy: Policy, prompts: list[PromptItem]) -> None:
        self.policy = policy
        takes = slice(0, 2 if policy.plan.mode.batched else 1)
        self.prompts, self.seeds = prompts[takes], (5, 6)[takes]
        if policy.plan.mode.shared:
            self.prompts = [
                replace(p, image=self.prompts[0].image, metadata=self.prompts[0].metadata) for p in self.prompts
            ]
        self.sampling = replace(ode_sampling(policy.cfg, 3), trained_steps=(0, 1, 2))
        self.values, recording = self.sample(keep_steps=(0, 1, 2))
        assert recording.final is not None
        self.final = recording.final
        part = pack_recording(recording, 0, len(self.seeds), keep_mean=False)
        self.trajectory = Trajectory(group=0, version=0, sampling=self.sampling, parts=(part,), spec=policy.spec)
        self.chain = DenoisingChain(self.trajectory, policy.modules, policy.device)

    def sample(self, **options) -> Sampled:
        return self.policy.sample(self.prompts, self.seeds, None, self.sampling, **options)

    def tail(self, steps: int) -> ReplayedTail:
        """The last steps, as the learner has them."""
        part = self.trajectory.parts[0]
        part = replace(part, steps=part.steps[len(part.steps) - steps :])
        replayer = Replayer(part, self.trajectory.spec, self.policy.modules, self.policy.device)
        return ReplayedTail(replace(self.trajectory, parts=(part,)), replayer, slice(None))

    def with_sample(self, step: int, x: torch.Tensor) -> RawStep:
        """A step of the pipeline's own call, started from another sample."""
        options = RecordOptions(keep_steps=frozenset({step}), samples={step: x}, stop_early=True)
        pipeline, plan = self.policy.pipeline, self.policy.plan
        return pipeline.sample(plan, self.prompts, self.seeds, None, self.sampling, options).recording.steps[0]


def inversion_gap(latent_map: LatentMap, x0: torch.Tensor) -> float:
    """How far latents are from themselves after they were mapped to samples like x0 and back, relative."""
    shape = (x0.shape[0], *latent_map.positions.shape)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    sample = latent_map.sample(latents).flatten(1)
    held = torch.from_numpy(latent_map.positions >= 0)
    again = sample[:, torch.from_numpy(latent_map.positions).clamp(min=0).flatten().long()].reshape(shape)
    again = again * torch.from_numpy(latent_map.scale) + torch.from_numpy(latent_map.shift)
    return float((again - latents)[:, held].abs().max()) / float(latents.abs().max())


def slope_gap(
    value: Callable[[], torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    moves: Sequence[float] = (3e-4, 3e-5, 3e-3, 3e-6, 3e-2),
    enough: float = 0.01,
) -> float:
    """How far a gradient is from finite differences, relative: of `value()`, a number, along the gradient itself and,
    as strongly, a random direction. The weights end up as they were.

    `moves`: how far `value` is moved, relative, tried in this order until the gap is `enough`: where the weights hardly
    matter, one size is beyond what is linear and another below what float32 resolves. A wrong gradient fits none."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    here = value()
    gradients = torch.autograd.grad(here, parameters, allow_unused=True)
    for parameter in parameters:
        parameter.requires_grad_(False)
    source = torch.Generator().manual_seed(3)
    noise = [torch.randn(parameter.shape, generator=source) for parameter in parameters]
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    length, of_noise = (float(torch.stack([t.norm() for t in tensors]).norm()) for tensors in (gradients, noise))
    directions = [g / length + n / of_noise for g, n in zip(gradients, noise, strict=True)]
    slope = float(sum((g.double() * d.double()).sum() for g, d in zip(gradients, directions, strict=True)))
    before, gaps = [parameter.clone() for parameter in parameters], []
    with torch.no_grad():
        for move in moves:
            size = move * max(abs(float(here.detach())), 0.1) / slope
            ends = []
            for sign in (1, -1):
                for parameter, start, direction in zip(parameters, before, directions, strict=True):
                    parameter.copy_(start + sign * size * direction)
                ends.append(float(value()))
            gaps.append(abs((ends[0] - ends[1]) / (2 * size) - slope) / slope)
            if gaps[-1] <= enough:
                break
        for parameter, start in zip(parameters, before, strict=True):
            parameter.copy_(start)
    return min(gaps)
