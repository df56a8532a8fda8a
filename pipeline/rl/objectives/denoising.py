"""Objectives on finished takes that are noised again: the loss is on the denoiser's prediction."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.rl.objectives.base import Loss, Requirements
from pipeline.rl.objectives.micro_batch import MicroBatch
from pipeline.rl.objectives.reference_penalty import WithReference

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DenoisingTerms:
    """One noise level of b finished takes. Float32; `output` carries gradients."""

    output: torch.Tensor  # [b, ...] the policy's prediction for x0 noised with eps
    target: torch.Tensor  # [b, ...] what a perfect model would predict; flow: eps - x0
    advantages: torch.Tensor  # [b]
    old_output: torch.Tensor | None  # [b, ...] the old policy's, where the objective requires one
    clean_error_scale: torch.Tensor  # [b, 1, ...] an error of the output, times this, is one of the predicted x0
    reference_output: torch.Tensor | None = None  # [b, ...] the starting policy's, where `uses_reference`


class DenoisingObjective(WithReference):
    """Loss on the denoiser's prediction; takes are drawn without noise, the trained steps say which levels train."""

    uses_reference: ClassVar[bool] = False  # the policy loss itself compares with the starting policy

    @property
    def requirements(self) -> Requirements:
        return Requirements(
            draws_noise=False,
            replay_metric="onpolicy/max_abs_gap",
            any_sample=True,
            given_takes=True,
            reference_every=1 if self.uses_reference else self.reference_every,
            joins_levels=True,
            extra_replay_check=True,
        )

    @abstractmethod
    def policy_loss(self, terms: DenoisingTerms) -> torch.Tensor:
        """Float32 [b], with gradients."""

    def loss(self, micro: MicroBatch) -> Loss:
        x0 = micro.clean()
        sigma, noise = micro.fresh_noise()
        x = micro.noised(x0, sigma, noise)
        old_output = micro.old_output(x).float() if self.requirements.old_policy else None
        reference_output = micro.reference_output(x).float() if self.uses_reference else None
        output = micro.output(x).float()
        terms = DenoisingTerms(
            output,
            micro.target(x0, sigma, noise),
            micro.advantages,
            old_output,
            micro.clean_error_scale(sigma),
            reference_output,
        )
        policy_loss = self.policy_loss(terms)

        def distance(rows: slice) -> torch.Tensor:
            if reference_output is not None:
                reference = reference_output[rows]
            else:
                reference = micro.reference_output(x[rows], rows).float()
            return (output[rows] - reference).pow(2).flatten(1).mean(1)

        total, logs = self.with_reference(policy_loss, micro, distance)
        return Loss(total, logs, replay_error=micro.replay_error())
