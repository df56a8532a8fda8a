"""One denoising step of finished takes: what the policy sees behind the noise is decoded and judged.

    ControlNet++ (arXiv 2404.07987)   denoising loss, and at low noise a reward's loss of the predicted x0
    Ctrl-U (arXiv 2410.11236)         uncertainty > 0: two neighbouring levels, one noise; u is how far their rewards
                                      are apart; the reward's loss counts exp(-u), and u is added
    RG-LCD (arXiv 2403.11027)         its reward part: denoising=0

Nothing is sampled: the takes may be captioned clips of data (source clips with noise 0), or the policy's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, model_validator

from pipeline.config.sections.base import Count, NonNegative
from pipeline.core.errors import ConfigError
from pipeline.rl.objectives.base import Loss, Requirements, register
from pipeline.rl.objectives.micro_batch import MicroBatch
from pipeline.rl.objectives.reward_shape import WithRewardShape, weighted, where_it_applies

if TYPE_CHECKING:
    from pipeline.config.schema import Config


@register("one_step")
class OneStep(WithRewardShape):
    """Finished takes are noised to a sampler step, drawn for each group, and denoised once; at low noise the predicted
    x0 is decoded, and rewards (`rewards.*.gradient`) teach through their gradient.

    The loss is denoising x mean |output - target|^2 + the sum over the rewards of weight x exp(-u) x shape(reward) + u.
    """

    reward_steps: Count = Field(
        2,
        description="The reward counts at the last so many sampler steps, where x0 can be predicted (ControlNet++: a "
        "fifth of all).",
    )
    denoising: NonNegative = Field(
        1.0, description="Weight of the denoising loss; 0: only the last `reward_steps` steps are trained."
    )
    uncertainty: NonNegative = Field(
        0.0,
        description="u is this times the difference of a reward at two neighbouring steps with the same noise; 0: none "
        "(Ctrl-U).",
    )

    @model_validator(mode="after")
    def _uncertain_loss_is_positive(self) -> OneStep:
        if self.uncertainty and self.shape == "linear":
            raise ValueError(
                "shape: linear has a loss below 0, which exp(-u) would weigh the wrong way round; with uncertainty set "
                "hinge or distance, and a target"
            )
        return self

    @property
    def requirements(self) -> Requirements:
        return Requirements(
            draws_noise=False,
            replay_metric="onpolicy/max_abs_gap",
            unit="tail",
            feedback="none",
            reward_gradient=True,
            any_sample=True,
            given_takes=True,
            min_takes=1,
        )

    def tail_steps(self, steps: int, of_step: np.random.Generator, of_group: np.random.Generator) -> range:
        first = 0 if self.denoising else steps - self.reward_steps
        step = int(of_group.integers(first, steps))
        noisier = self.uncertainty > 0 and step > 0 and self._counts(steps - step)
        return range(step - noisier, step + 1)

    def _counts(self, steps_left: int) -> bool:
        """Whether the reward does, that many steps from the finished take."""
        return steps_left <= self.reward_steps

    @property
    def terms(self) -> dict[str, float]:
        return {"denoising": self.denoising, "reward_loss": 1.0, **({"uncertainty": 1.0} if self.uncertainty else {})}

    @property
    def logged(self) -> tuple[str, ...]:
        return (*self.terms, "reward/mean")  # and each reward's, which the learner adds

    def check(self, cfg: Config) -> None:
        super().check(cfg)
        if self.reward_steps > cfg.sampler.steps:
            raise ConfigError(
                f"objective.reward_steps: found {self.reward_steps}; sampler.steps is {cfg.sampler.steps}"
            )

    def loss(self, micro: MicroBatch) -> Loss:
        x0, noise, steps_left = micro.clean(), micro.noise_of_takes(), micro.steps_left
        here = micro.denoise(len(steps_left) - 1, x0, noise)
        none = here.error.new_zeros(here.error.shape)
        total, logs = self.denoising * here.error, {"denoising": here.error.detach(), "reward_loss": none}
        if self.uncertainty:
            logs["uncertainty"] = none
        if not self._counts(steps_left[-1]):
            return Loss(total, logs)
        weights, rewards = micro.reward_weights, micro.rewards(micro.pixels(here.clean))
        losses = {name: self.shaped(reward) for name, reward in rewards.items()}
        if len(steps_left) > 1:
            noisier = micro.rewards(micro.pixels(micro.denoise(0, x0, noise).clean))
            u = {name: self.uncertainty * where_it_applies((rewards[name] - noisier[name]).abs()) for name in rewards}
            losses = {name: (-u[name]).exp() * loss for name, loss in losses.items()}
            spread = weighted(dict.fromkeys(u, 1.0), u)
            total, logs["uncertainty"] = total + spread, spread.detach()
        reward_loss = weighted(weights, losses)
        logs |= {f"reward/{name}": reward.detach() for name, reward in rewards.items()}
        logs["reward_loss"] = reward_loss.detach()
        logs["reward/mean"] = weighted(weights, {name: where_it_applies(r.detach()) for name, r in rewards.items()})
        return Loss(total + reward_loss, logs)
