"""One copy of what is trained: from a group's micro-batches to losses with gradients.

A learner has one replica, or on a CPU several, each in its own thread: they share the weights' memory, not the
gradients.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import Config
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import GroupBatch, Trajectory
from pipeline.generators import adapters
from pipeline.generators.replay.noising import noised, target
from pipeline.generators.replay.replayer import Replayer
from pipeline.generators.replay.text_inputs import TextReencoder, reference_inputs
from pipeline.learner.micro_batch import MicroBatch, micro_batches_of
from pipeline.learner.trained_model import Modules
from pipeline.rl.objectives import (
    DenoisingObjective,
    DenoisingTerms,
    PolicyLoss,
    TransitionObjective,
    TransitionTerms,
    get_objective,
)
from pipeline.rl.samplers import gaussian_kl, log_prob


@dataclass(frozen=True, slots=True)
class MicroBatchLoss:
    """Of the b takes of a micro-batch; all but `total` detached."""

    total: torch.Tensor  # [b], policy loss and KL term, with gradients
    policy: PolicyLoss
    kl: torch.Tensor  # [b], not yet weighed by kl_beta
    replay_error: torch.Tensor  # replay minus rollout: log-ratios [b], or samples [b, ...]; [1] zero if not checked


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
        self.objective = get_objective(cfg.algorithm.objective)

    def replicate(self) -> Replica:
        """Another replica that shares the weights and has its own gradients."""
        everything = [self.modules, self.trained, self.reference or {}]
        tensors = [t for modules in everything for m in modules.values() for t in (*m.parameters(), *m.buffers())]
        same: dict[int, Any] = {}
        for tensor in tensors:
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            same[id(tensor)] = torch.nn.Parameter(tensor.data, tensor.requires_grad) if is_parameter else tensor
        modules, trained, reference = copy.deepcopy((self.modules, self.trained, self.reference), same)
        return Replica(self.cfg, self.device, modules, trained, reference)

    def micro_batches(self, trajectory: Trajectory, number: int) -> list[MicroBatch]:
        """Those of one part of a trajectory, on the replica's device."""
        replayer = Replayer(trajectory.parts[number], trajectory.spec, self.modules, self.device)
        if self.text is not None:
            self.text.override_text(replayer, trajectory.sampling)
        return micro_batches_of(self.cfg, replayer)

    def losses(self, group: GroupBatch, micro: MicroBatch, check_replay: bool) -> MicroBatchLoss:
        """`check_replay`: the group is one whose replay is compared with its rollout, where that costs an extra
        forward pass (else every micro-batch is compared)."""
        trajectory, advantages = group.held, micro.advantages(group)
        if isinstance(self.objective, TransitionObjective):
            return self._transition_loss(self.objective, trajectory, micro, advantages)
        if isinstance(self.objective, DenoisingObjective):
            return self._denoising_loss(self.objective, trajectory, micro, advantages, check_replay)
        raise TypeError(f"objective {self.objective.name} is neither a TransitionObjective nor a DenoisingObjective")

    # ------------------------------------------------------------------------------------------- losses

    def _transition_loss(
        self, objective: TransitionObjective, trajectory: Trajectory, micro: MicroBatch, advantages: torch.Tensor
    ) -> MicroBatchLoss:
        """Of one transition whose noise was drawn."""
        algorithm, sampling = self.cfg.algorithm, trajectory.sampling
        x, x_next, old_log_prob = micro.replayer.step_tensors(micro.step, micro.takes)
        step = micro.transition(x, self._model_output(micro, x), sampling)
        terms = TransitionTerms(
            log_prob=log_prob(x_next, step),
            old_log_prob=old_log_prob,
            advantages=advantages,
            step=step,
            old_mean=micro.replayer.old_mean(micro.step, micro.takes) if micro.recorded.mean is not None else None,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
        )
        policy = objective.loss(terms)
        total, kl = policy.loss, torch.zeros_like(policy.loss)
        if micro.kl_takes(self.cfg, trajectory.group):
            # Closed form between Gaussians of equal std (per dimension); only the reference is outside the graph.
            reference = micro.transition(x, self._reference_output(micro, x), sampling)
            kl = algorithm.kl_every * gaussian_kl(step, reference.mean)
            total = total + algorithm.kl_beta * kl
        return MicroBatchLoss(total, policy, kl.detach(), (terms.log_prob - old_log_prob).detach())

    def _denoising_loss(
        self,
        objective: DenoisingObjective,
        trajectory: Trajectory,
        micro: MicroBatch,
        advantages: torch.Tensor,
        check_replay: bool,
    ) -> MicroBatchLoss:
        """Of finished takes, noised again to the trained step's sigma."""
        replayer = micro.replayer
        if not replayer.takes_any_sample(micro.step):
            why = replayer.spec.why_not_noised_again(objective.name)
            raise UnsupportedPolicyError(why or f"{replayer.spec.pipeline}: inputs of another shape than was probed")
        x0 = replayer.clean(micro.takes).float()
        sigma, eps = self._fresh_noise(trajectory, micro, x0)
        prediction = replayer.spec.prediction
        x = noised(prediction, sigma, x0, eps).to(getattr(torch, micro.recorded.sample.dtype))
        output = self._model_output(micro, x).float()
        policy = objective.loss(DenoisingTerms(output, target(prediction, sigma, x0, eps), advantages))
        kl = torch.zeros_like(policy.loss)
        for takes in micro.kl_takes(self.cfg, trajectory.group):
            rows = slice(takes.start - micro.takes.start, takes.stop - micro.takes.start)
            reference = self._reference_output(micro.of_rows(takes), x[rows]).float()
            kl[rows] = self.cfg.algorithm.kl_every * (output[rows] - reference).pow(2).flatten(1).mean(1)
        total = policy.loss + self.cfg.algorithm.kl_beta * kl
        error = self._replay_error(trajectory, micro) if check_replay and micro.checks_replay else torch.zeros(1)
        return MicroBatchLoss(total, policy, kl.detach(), error)

    def _model_output(self, micro: MicroBatch, x: torch.Tensor) -> torch.Tensor:
        """What the scheduler would be given for the sample x [b, ...]."""
        with torch.autocast(
            self.device.type,
            dtype=getattr(torch, self.cfg.learner.autocast, None),
            enabled=self.cfg.learner.autocast != "none",
        ):
            return micro.model_output(x)

    @torch.no_grad()
    def _reference_output(self, micro: MicroBatch, x: torch.Tensor) -> torch.Tensor:
        """The starting policy's output: adapter off (LoRA) or the frozen copy (full weights)."""
        if self.reference is None:
            with adapters.adapters_off(self.trained), reference_inputs(micro.replayer):
                return self._model_output(micro, x)
        frozen = Replayer(micro.replayer.part, micro.replayer.spec, self.reference, self.device)
        return self._model_output(MicroBatch(frozen, micro.step, micro.takes), x)

    @torch.no_grad()
    def _replay_error(self, trajectory: Trajectory, micro: MicroBatch) -> torch.Tensor:
        """How far a replayed deterministic step is from the rollout's [b, ...]: 0 on-policy."""
        micro = micro.unjoined()
        x, x_next = micro.replayer.samples(micro.step, micro.takes)
        replayed = micro.transition(x, self._model_output(micro, x), trajectory.sampling).mean
        return (replayed.to(x_next.dtype) - x_next).float()

    def _fresh_noise(
        self, trajectory: Trajectory, micro: MicroBatch, x0: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sigmas (float64 [b, 1, ...]) and noise (like x0 [b, ...]) of the takes."""
        steps, repeats = micro.joined_steps, micro.replayer.plain.total
        sigma = torch.tensor([step.sigma for step in steps], dtype=torch.float64, device=x0.device)
        noise = [matching_noise(self.cfg.run.seed, trajectory.group, step.index, x0[0]) for step in steps]
        sigma = sigma.repeat_interleave(repeats)[micro.takes].reshape(-1, *[1] * (x0.ndim - 1))
        return sigma, torch.stack(noise).repeat_interleave(repeats, 0)[micro.takes]


def matching_noise(run_seed: int, group: int, index: int, like: torch.Tensor) -> torch.Tensor:
    """The noise for the finished takes of `group` at sampler step `index`: float32, shaped like one take, the same
    after a resume. All takes of a group share it: what they have in common cancels, since advantages sum to zero."""
    seed = int(np.random.SeedSequence([run_seed, group, index, 0xA3]).generate_state(1)[0])
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)
