"""What an objective is: a policy loss, and what it requires of rollout, recorder, learner and metrics.

Two kinds. A `TransitionObjective` sees recorded transitions x_t -> x_next, whose noise the sampler drew, and their
log-probs. A `DenoisingObjective` sees finished takes that are noised again and denoised once.
Nothing here imports torch, so that names and checks are available before a model is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipeline.core.errors import ConfigError
from pipeline.core.registry import Registry
from pipeline.rl.samplers.base import gaussian_kl

if TYPE_CHECKING:
    import torch

    from pipeline.config.schema import Config
    from pipeline.rl.samplers.base import Transition


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Of the b takes of a micro-batch, float32 [b] each."""

    loss: torch.Tensor  # with gradients
    ratio: torch.Tensor  # probability under the policy in training / under the rollout policy; 1 on-policy
    clipped_low: torch.Tensor  # 1 where the ratio is too low for the take to contribute
    clipped_high: torch.Tensor  # the same, too high


@dataclass(frozen=True, slots=True)
class TransitionTerms:
    """One transition of b takes. Float32; `log_prob` and `step.mean` carry gradients."""

    log_prob: torch.Tensor  # [b] of x_next under the policy in training, mean over dims
    old_log_prob: torch.Tensor  # [b] under the policy that made the rollout
    advantages: torch.Tensor  # [b]
    step: Transition  # mean [b, ...], std, dt of the policy in training
    old_mean: torch.Tensor | None  # [b, ...] of the rollout policy, where the objective needs it
    clip_low: float
    clip_high: float

    def divergence(self) -> torch.Tensor:
        """KL to the rollout policy per dimension [b]. Raises ValueError where its mean was not recorded."""
        if self.old_mean is None:
            raise ValueError("this objective needs the rollout policy's mean, which was not recorded")
        return gaussian_kl(self.step, self.old_mean)


@dataclass(frozen=True, slots=True)
class DenoisingTerms:
    """One noise level of b finished takes. Float32; `output` carries gradients."""

    output: torch.Tensor  # [b, ...] the policy's prediction for x0 noised with eps
    target: torch.Tensor  # [b, ...] what a perfect model would predict; flow: eps - x0
    advantages: torch.Tensor  # [b]


class Objective(ABC):
    """A policy loss and its requirements. A subclass is made once, without arguments, and keeps no state.

    Everything that depends on the objective asks these attributes, never its name.
    """

    name: ClassVar[str]  # set by `register`
    draws_noise: ClassVar[bool]  # takes are drawn with the sampler's noise; else without any, by the ODE
    needs_old_mean: ClassVar[bool] = False  # the rollout keeps the means of its transitions
    joins_steps: ClassVar[bool] = False  # several trained steps may share one denoiser call
    needs_any_sample: ClassVar[bool] = False  # denoises samples that no rollout came by
    extra_replay_check: ClassVar[bool] = False  # comparing replay with rollout costs an extra forward pass
    replay_metric: ClassVar[str]  # name of the largest difference between replay and rollout
    samplers: ClassVar[tuple[str, ...] | None] = None  # those it is defined for; None: all
    max_updates_per_step: ClassVar[int | None] = None  # None: any number

    def check(self, cfg: Config) -> None:
        """Rules of consistency that concern the objective. Raises `ConfigError` naming the key and the fix.

        A subclass adds its rules to these: call `super().check(cfg)`.
        """
        if self.draws_noise and self.samplers is not None and cfg.sampler.kind not in self.samplers:
            raise ConfigError(f"algorithm.objective: {self.name} needs sampler.kind {' or '.join(self.samplers)}")
        limit = self.max_updates_per_step
        if limit is not None and cfg.algorithm.updates_per_step > limit:
            raise ConfigError(
                f"algorithm.updates_per_step: found {cfg.algorithm.updates_per_step}; algorithm.objective {self.name} "
                f"allows at most {limit}"
            )
        if not self.draws_noise and cfg.sampler.same_initial_noise:
            raise ConfigError(
                f"sampler.same_initial_noise: must be false with algorithm.objective {self.name}, whose takes differ "
                "by their initial noise alone"
            )


class TransitionObjective(Objective):
    """Policy gradient on the log-probs of the noise that the sampler drew."""

    draws_noise = True
    replay_metric = "onpolicy/max_abs_log_ratio"

    @abstractmethod
    def loss(self, terms: TransitionTerms) -> PolicyLoss: ...


class DenoisingObjective(Objective):
    """Loss on the denoiser's prediction for finished takes that are noised again."""

    draws_noise = False
    needs_any_sample = True
    joins_steps = True
    extra_replay_check = True
    replay_metric = "onpolicy/max_abs_gap"

    @abstractmethod
    def loss(self, terms: DenoisingTerms) -> PolicyLoss: ...


OBJECTIVES: Registry[Objective] = Registry("algorithm.objective", "pipeline.rl.objectives")
register = OBJECTIVES.register


def clipped_loss(advantages: torch.Tensor, ratio: torch.Tensor, low: float, high: float) -> PolicyLoss:
    """max(-A r, -A clamp(r, 1 - low, 1 + high)) (PPO, arXiv 1707.06347 eq. 7), per take."""
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - low, 1.0 + high)
    return PolicyLoss(
        loss=unclipped.maximum(clipped),
        ratio=ratio.detach(),
        clipped_low=((ratio < 1.0 - low) & (advantages < 0)).float(),
        clipped_high=((ratio > 1.0 + high) & (advantages > 0)).float(),
    )
