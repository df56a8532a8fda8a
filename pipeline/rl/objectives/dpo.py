"""DPO: the better take of a pair shall be denoised better than the worse one, compared with the starting policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.config.sections.base import Positive
from pipeline.rl.objectives.base import Loss, Objective, Requirements, register
from pipeline.rl.objectives.micro_batch import MicroBatch

if TYPE_CHECKING:
    import torch


@register("dpo")
class DPO(Objective):
    """Diffusion-DPO (arXiv 2311.12908): -log sigmoid(-beta/2 [(M_w - M_w,ref) - (M_l - M_l,ref)]).

    M = mean_D |output - target|^2 of a finished take noised again, with the same noise for both takes; ref is the
    starting policy. At the start the loss is log 2. Pairs may come from takes of any version.
    """

    beta: Positive = Field(100.0, description="How strongly the starting policy holds: larger is closer to it.")

    @property
    def requirements(self) -> Requirements:
        return Requirements(
            draws_noise=False,
            replay_metric="onpolicy/max_abs_gap",
            feedback="pairs",
            any_sample=True,
            whole_group=True,
            reference_every=1,
            joins_levels=True,
            extra_replay_check=True,
        )

    @property
    def terms(self) -> dict[str, float]:
        return {"dpo_loss": 1.0}

    @property
    def logged(self) -> tuple[str, ...]:
        return ("dpo_loss", "dpo/accuracy", "dpo/margin")

    def loss(self, micro: MicroBatch) -> Loss:
        from torch.nn.functional import logsigmoid

        pairs = micro.pairs
        x0 = micro.clean()
        sigma, noise = micro.fresh_noise()
        x, target = micro.noised(x0, sigma, noise), micro.target(x0, sigma, noise)
        reference_error = (micro.reference_output(x).float() - target).pow(2).flatten(1).mean(1)
        change = (micro.output(x).float() - target).pow(2).flatten(1).mean(1) - reference_error
        margin = -self.beta / 2.0 * (change[pairs.better] - change[pairs.worse])
        loss = -pairs.weights * logsigmoid(margin)

        def per_take(values: torch.Tensor) -> torch.Tensor:
            """Values [P] of pairs as values [b] of takes with the same mean: the learner averages over takes."""
            rows = change.new_zeros(change.shape)
            return rows.index_add(0, pairs.better, values * (len(rows) / max(1, len(values))))

        detached = margin.detach()
        logs = {"dpo_loss": loss.detach(), "dpo/accuracy": (detached > 0).float(), "dpo/margin": detached}
        return Loss(
            per_take(loss), {name: per_take(value) for name, value in logs.items()}, replay_error=micro.replay_error()
        )
