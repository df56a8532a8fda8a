"""Reward gradients: the end of the sampler's chain, the decoder and the reward are one graph, which is differentiated.

    DRaFT-K (arXiv 2309.17400)      tail=K; DRaFT-LV: copies=2
    AlignProp (arXiv 2310.03739)    tail=[shortest, longest], drawn anew each step
    ReFL (arXiv 2304.05977)         jump=N, shape=hinge: one of the last N steps, drawn for each group, goes to its
                                    x0 prediction
    DRTune (arXiv 2405.00760)       detach=true
    R0 (Luo et al. 2025)            balance=true, anchor, several rewards

The steps before have no gradient to the weights in any of these, so rollout workers draw them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, model_validator

from pipeline.config.sections.base import Count, Natural, NonNegative
from pipeline.core.errors import ConfigError
from pipeline.rl.objectives.base import Loss, Requirements, register
from pipeline.rl.objectives.micro_batch import MicroBatch
from pipeline.rl.objectives.reward_shape import WithRewardShape, weighted, where_it_applies

if TYPE_CHECKING:
    import torch

    from pipeline.config.schema import Config


@register("reward_gradient")
class RewardGradient(WithRewardShape):
    """Learn through the gradient of rewards (`rewards.*.gradient`), back through the decoder and the last steps.

    The loss is the sum over the rewards of weight x shape(reward). Takes are drawn without noise; no signal is needed.
    """

    tail: Count | Annotated[list[Count], Field(min_length=2, max_length=2)] = Field(
        1,
        description="Sampler steps that gradients go through, the last ones; or [shortest, longest], drawn anew for "
        "each optimisation step.",
    )
    jump: Natural = Field(
        0,
        description="The tail ends at one of the last `jump` steps, drawn for each group, and goes to its x0 "
        "prediction (ReFL: a quarter of the steps); 0: at the last step.",
    )
    copies: Natural = Field(
        0,
        description="DRaFT-LV: finished takes are noised to the last step this many times more and denoised again; "
        "the loss is the mean over all (2 in the paper).",
    )
    detach: bool = Field(
        False, description="No gradients through the denoiser's input, only along the samples (DRTune)."
    )
    balance: bool = Field(
        False,
        description="Scale each reward's gradient at the pictures to length 1 for every take, before weights apply "
        "(R0).",
    )
    kl_beta: NonNegative = Field(
        0.0,
        description="Weight of the mean squared distance from the takes that the starting policy ends the tail with.",
    )
    anchor: NonNegative = Field(
        0.0, description="Pull to the starting weights: w -= lr * anchor * (w - start) with each update (R0)."
    )

    @model_validator(mode="after")
    def _options_fit(self) -> RewardGradient:
        if isinstance(self.tail, list) and self.tail[0] > self.tail[1]:
            raise ValueError(f"tail: found {self.tail}; the first number must not be above the second")
        if self.copies and self.jump:
            raise ValueError(f"copies: {self.copies} noise finished takes again, and with jump there are none; set one")
        return self

    @property
    def _lengths(self) -> tuple[int, int]:
        """Shortest and longest tail."""
        return (self.tail[0], self.tail[1]) if isinstance(self.tail, list) else (self.tail, self.tail)

    @property
    def requirements(self) -> Requirements:
        return Requirements(
            draws_noise=False,
            replay_metric="onpolicy/max_abs_tail_gap",
            unit="tail",
            feedback="none",
            reward_gradient=True,
            moved_sample=self._lengths[1] > 1 or self.copies > 0,
            reference_every=1 if self.kl_beta else 0,
            pull_to_start=self.anchor,
            min_takes=1,
        )

    def tail_steps(self, steps: int, of_step: np.random.Generator, of_group: np.random.Generator) -> range:
        shortest, longest = self._lengths
        length = int(of_step.integers(shortest, longest + 1))  # the same for all groups: ranks have equal work
        end = steps - int(of_group.integers(self.jump)) if self.jump else steps
        return range(max(0, end - length), end)

    @property
    def terms(self) -> dict[str, float]:
        return {"reward_loss": 1.0, **({"kl": self.kl_beta} if self.kl_beta else {})}

    @property
    def logged(self) -> tuple[str, ...]:
        return (*self.terms, "reward/mean")  # and each reward's, which the learner adds

    def check(self, cfg: Config) -> None:
        super().check(cfg)
        for key, steps in (("tail", self._lengths[1]), ("jump", self.jump)):
            if steps > cfg.sampler.steps:
                raise ConfigError(f"objective.{key}: found {steps}; sampler.steps is {cfg.sampler.steps}")

    # -- the loss -------------------------------------------------------------------------------------------------

    def loss(self, micro: MicroBatch) -> Loss:
        finished = micro.finish(bool(self.jump), self.detach)
        again = [micro.denoise_again(finished.clean, number) for number in range(self.copies)]
        judged = [self._judge(micro, x0) for x0 in (finished.clean, *again)]
        total = _mean([each.total for each in judged])
        logs = {"reward_loss": _mean([each.loss for each in judged]), **judged[0].rewards}
        if self.kl_beta:
            kl = (finished.clean.float() - micro.reference_finish(bool(self.jump)).float()).pow(2).flatten(1).mean(1)
            total, logs["kl"] = total + self.kl_beta * kl, kl.detach()
        return Loss(total, logs, replay_error=finished.replay_error)

    def _judge(self, micro: MicroBatch, x0: torch.Tensor) -> Judged:
        pixels, weights = micro.pixels(x0), micro.reward_weights
        if not self.balance:
            values = micro.rewards(pixels)
            total = weighted(weights, {name: self.shaped(value) for name, value in values.items()})
        else:
            leaf = pixels.detach().requires_grad_()
            values = micro.rewards(leaf)
            pull = self._balanced_pull(values, weights, leaf)
            total = (pixels * pull).flatten(1).sum(1)
        detached = {name: where_it_applies(value.detach()) for name, value in values.items()}
        loss = weighted(weights, {name: self.shaped(value.detach()) for name, value in values.items()})
        rewards = {f"reward/{name}": value for name, value in detached.items()}
        return Judged(total, loss, {**rewards, "reward/mean": weighted(weights, detached)})

    def _balanced_pull(
        self, values: Mapping[str, torch.Tensor], weights: Mapping[str, float], pixels: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum over the rewards of d loss / d pixels, each of length 1 for every take [b, F, 3, H, W]."""
        import torch

        pull = torch.zeros_like(pixels)
        for name, value in values.items():
            (gradient,) = torch.autograd.grad(self.shaped(value).sum(), pixels, retain_graph=True)
            length = gradient.flatten(1).norm(dim=1).clamp(min=_LEAST_LENGTH)
            pull += weights[name] * gradient / length.reshape(-1, *[1] * (gradient.ndim - 1))
        return pull.detach()


_LEAST_LENGTH = 1e-12  # of a gradient that is scaled to length 1; 0 stays 0


@dataclass(frozen=True, slots=True)
class Judged:
    """One x0 of b takes, float32 [b] each."""

    total: torch.Tensor  # with gradients
    loss: torch.Tensor  # its value, detached: where gradients are balanced, `total` has none that means anything
    rewards: dict[str, torch.Tensor]  # metric -> value, detached


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(values[1:], values[0]) / len(values)
