"""One copy of what is trained, replaying micro-batches: from a group to losses with gradients.

A micro-batch is one trained transition of some takes of one group, so its inputs are exactly the recorded ones
(objective awm: several of them, with `learner.micro_batch` above the group size). A learner has one lane, or on a CPU
several, each with a thread of its own: their weights are the same memory, their gradients are not.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import Config
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import GroupBatch, MicroBatchSpecs, Trajectory
from pipeline.generators import adapters
from pipeline.generators.replay.merge_steps import merged
from pipeline.generators.replay.replayer import Replayer
from pipeline.generators.replay.text_inputs import TextReencoder, reference_inputs
from pipeline.generators.spec import PolicySpec
from pipeline.rl.objectives import OBJECTIVES, Terms, matching
from pipeline.rl.samplers import Transition, log_prob
from pipeline.rl.samplers.transition import gaussian_kl

Modules = dict[str, torch.nn.Module]
MicroBatch = tuple[Replayer, int, slice]  # the replayed takes of its trained step j


class Replica:
    """`modules`: the denoisers; `trained`: what has trainable weights; `reference`: frozen copies of the denoisers
    (full weights with a KL term, else None); `text`: where text encoders are trained."""

    def __init__(
        self,
        cfg: Config,
        device: torch.device,
        modules: Modules,
        trained: Modules,
        reference: Modules | None,
        text: TextReencoder | None = None,
    ) -> None:
        self.cfg, self.device, self.text = cfg, device, text
        self.modules, self.trained, self.reference = modules, trained, reference

    def replicate(self) -> Replica:
        """Another lane over the same weights, with gradients of its own."""
        everything = [self.modules, self.trained, self.reference or {}]
        tensors = [t for modules in everything for m in modules.values() for t in (*m.parameters(), *m.buffers())]
        same: dict[int, Any] = {}
        for tensor in tensors:
            parameter = isinstance(tensor, torch.nn.Parameter)
            same[id(tensor)] = torch.nn.Parameter(tensor.data, tensor.requires_grad) if parameter else tensor
        modules, trained, reference = copy.deepcopy((self.modules, self.trained, self.reference), same)
        return Replica(self.cfg, self.device, modules, trained, reference)

    # ------------------------------------------------------------------------------------------- micro-batches

    def micro_batches(self, trajectory: Trajectory, number: int) -> list[MicroBatch]:
        """Those of one part of a trajectory, on the lane's device."""
        spec = PolicySpec.from_dict(trajectory.spec)
        replayer = Replayer(trajectory.parts[number], spec, self.modules, self.device)
        if self.text is not None:
            self.text.override_text(replayer, trajectory.sampling)
        return _micro_batches(self.cfg, replayer)

    def losses(self, group: GroupBatch, micro: MicroBatch, look: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss per take [b] of a micro-batch, with gradients, and detached logs [b]. `look`: with awm, the replay of
        the group is compared with its rollout (other objectives always do)."""
        replayer, j, takes = micro
        advantages = self.advantages(group, replayer, takes)
        if self.cfg.algorithm.objective != "awm":
            return self._policy_loss(group.held, replayer, j, takes, advantages)
        loss, logs = self._matching_loss(group.held, replayer, j, takes, advantages)
        look = look and _looks_at_replay(self.cfg, replayer, j, takes)
        gap = self._replay_gap(group.held, replayer, j, takes) if look else torch.zeros(1)
        return loss, {**logs, "gap": gap}

    def advantages(self, group: GroupBatch, replayer: Replayer, takes: slice) -> torch.Tensor:
        part = replayer.plain.part
        own = np.tile(group.advantages[part.start : part.stop], replayer.total // replayer.plain.total)[takes]
        return torch.from_numpy(np.array(own, np.float32)).to(self.device)

    # ------------------------------------------------------------------------------------------- losses

    def _transition(
        self, trajectory: Trajectory, replayer: Replayer, j: int, takes: slice, x: torch.Tensor
    ) -> Transition:
        """The policy's Gaussian at trained step `j`, from a fresh denoiser call."""
        return replayer.move(j, takes, x, self._output(replayer, j, takes, x), trajectory.sampling)

    def _output(self, replayer: Replayer, j: int, takes: slice, x: torch.Tensor) -> torch.Tensor:
        """What the scheduler would be given at step `j` for the sample x [b, ...]."""
        with torch.autocast(
            self.device.type,
            dtype=getattr(torch, self.cfg.learner.autocast, None),
            enabled=self.cfg.learner.autocast != "none",
        ):
            return replayer.model_output(j, takes, x)

    def _policy_loss(
        self, trajectory: Trajectory, replayer: Replayer, j: int, takes: slice, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of one transition whose noise was drawn."""
        algorithm = self.cfg.algorithm
        x, x_next, old = replayer.step_tensors(j, takes)
        step = self._transition(trajectory, replayer, j, takes, x)
        logp = log_prob(x_next, step)
        terms = Terms(
            log_prob=logp,
            old_log_prob=old,
            advantages=advantages,
            step=step,
            old_mean=replayer.old_mean(j, takes) if replayer.part.steps[j].mean is not None else None,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
        )
        policy_loss, logs = OBJECTIVES[algorithm.objective](terms)
        loss = policy_loss
        kl = torch.zeros_like(policy_loss)
        if _kl_rows(self.cfg, trajectory.group, replayer, j, takes):
            # Closed form between Gaussians of equal std (per dimension); only the reference is outside the graph.
            reference = self._reference_output(replayer, j, takes, x)
            kl = algorithm.kl_every * gaussian_kl(step, replayer.move(j, takes, x, reference, trajectory.sampling).mean)
            loss = loss + algorithm.kl_beta * kl
        logs = {**logs, "gap": (logp - old).detach(), "policy_loss": policy_loss.detach(), "kl": kl.detach()}
        return loss, logs

    def _matching_loss(
        self, trajectory: Trajectory, replayer: Replayer, j: int, takes: slice, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`awm`: finished takes are noised to step `j`'s sigma and their flow-matching error weighed."""
        step = replayer.part.steps[j]
        if replayer.spec.prediction != "flow" or not replayer.takes_any_sample(j):
            raise UnsupportedPolicyError(
                f"algorithm.objective: awm needs a flow model whose denoiser is given the sample itself; "
                f"{replayer.spec.pipeline} predicts {replayer.spec.prediction}; use grpo"
            )
        x0 = replayer.clean(takes).float()
        sigma, eps = self._noise(trajectory, replayer, j, takes, x0)
        noised = ((1.0 - sigma).float() * x0 + sigma.float() * eps).to(getattr(torch, step.sample.dtype))
        velocity = self._output(replayer, j, takes, noised).float()
        policy_loss, logs = matching(velocity, eps - x0, advantages)
        kl = torch.zeros_like(policy_loss)
        for some in _kl_rows(self.cfg, trajectory.group, replayer, j, takes):
            rows = slice(some.start - takes.start, some.stop - takes.start)
            distance = velocity[rows] - self._reference_output(replayer, j, some, noised[rows]).float()
            kl[rows] = self.cfg.algorithm.kl_every * distance.pow(2).flatten(1).mean(1)
        return policy_loss + self.cfg.algorithm.kl_beta * kl, {**logs, "kl": kl.detach()}

    def _noise(
        self, trajectory: Trajectory, replayer: Replayer, j: int, takes: slice, x0: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sigmas (float64 [b, 1, ...]) and noise (like x0 [b, ...]) of the takes."""
        steps, copies = replayer.steps_of(j), replayer.plain.total
        sigma = torch.tensor([step.sigma for step in steps], dtype=torch.float64, device=x0.device)
        noise = [matching_noise(self.cfg.run.seed, trajectory.group, step.index, x0[0]) for step in steps]
        sigma = sigma.repeat_interleave(copies)[takes].reshape(-1, *[1] * (x0.ndim - 1))
        return sigma, torch.stack(noise).repeat_interleave(copies, 0)[takes]

    @torch.no_grad()
    def _replay_gap(self, trajectory: Trajectory, replayer: Replayer, j: int, takes: slice) -> torch.Tensor:
        """How far a replayed deterministic step is from the rollout's: 0 on-policy."""
        if replayer.plain is not replayer:
            replayer, takes = replayer.plain, slice(0, replayer.plain.total)
        x, x_next = replayer.samples(j, takes)
        return (self._transition(trajectory, replayer, j, takes, x).mean.to(x_next.dtype) - x_next).float()

    @torch.no_grad()
    def _reference_output(self, replayer: Replayer, j: int, takes: slice, x: torch.Tensor) -> torch.Tensor:
        """The starting policy's output: adapter off (LoRA) or the frozen copy (full weights)."""
        if self.reference is None:
            with adapters.adapters_off(self.trained), reference_inputs(replayer):
                return self._output(replayer, j, takes, x)
        other = Replayer(replayer.part, replayer.spec, self.reference, self.device)
        return self._output(other, j, takes, x)


def micro_batch_specs(cfg: Config, trajectory: Trajectory) -> MicroBatchSpecs:
    """What the learner's ranks must know of a trajectory to divide it among themselves."""
    found = []
    for number, part in enumerate(trajectory.parts):
        replayer = Replayer(part, PolicySpec.from_dict(trajectory.spec), {}, torch.device("cpu"))
        for at, (several, j, takes) in enumerate(_micro_batches(cfg, replayer)):
            calls = [call.module for call in several.part.steps[j].calls]
            calls += ["reference"] * len(_kl_rows(cfg, trajectory.group, several, j, takes))
            found.append(
                (number, at, takes.stop - takes.start, (tuple(calls), _looks_at_replay(cfg, several, j, takes)))
            )
    return tuple(found)


def _micro_batches(cfg: Config, replayer: Replayer) -> list[MicroBatch]:
    size = cfg.learner.micro_batch or replayer.total
    joinable = cfg.algorithm.objective == "awm" and cfg.trainable.modules == "denoiser"
    if joinable and (joined := merged(replayer, size)):
        return [(several, 0, slice(0, several.total)) for several in joined]
    return [
        (replayer, j, slice(start, min(start + size, replayer.total)))
        for j in range(len(replayer.part.steps))
        for start in range(0, replayer.total, size)
    ]


def _kl_rows(cfg: Config, group: int, replayer: Replayer, j: int, takes: slice) -> list[slice]:
    """The takes of a micro-batch, a slice for each call, that the KL term holds to the reference: those of every
    `kl_every`-th trained step, which is another one in the next group."""
    if cfg.algorithm.kl_beta == 0:
        return []
    trained, copies = [step.index for step in replayer.plain.part.steps], replayer.plain.total
    found: list[slice] = []
    for number, step in enumerate(replayer.steps_of(j)):
        start, stop = max(takes.start, number * copies), min(takes.stop, (number + 1) * copies)
        if (trained.index(step.index) + group) % cfg.algorithm.kl_every == 0 and start < stop:
            if found and found[-1].stop == start:
                start = found.pop().start
            found.append(slice(start, stop))
    return found


def _looks_at_replay(cfg: Config, replayer: Replayer, j: int, takes: slice) -> bool:
    """Objective awm: the check costs a forward pass that serves nothing else, so of a group that is looked at, the
    first trained step of its first takes is."""
    first = replayer.steps_of(j)[0] is replayer.plain.part.steps[0] and takes.start == 0
    return cfg.algorithm.objective == "awm" and first


def matching_noise(run_seed: int, group: int, index: int, like: torch.Tensor) -> torch.Tensor:
    """The noise that the finished takes of `group` get at sampler step `index`: like one take, float32, the same after
    a resume. One for the whole group: what is common to its takes cancels, since advantages sum to zero."""
    seed = int(np.random.SeedSequence([run_seed, group, index, 0xA3]).generate_state(1)[0])
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)
