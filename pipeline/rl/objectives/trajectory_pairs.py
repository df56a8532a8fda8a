"""Preferences between drawn trajectories, by the log-probs of the noise that the sampler drew.

    D3PO (arXiv 2311.13231)     fit=order, against=start: at each step by itself
    PRDP (arXiv 2402.08714)     fit=gap, against=start: the sum over a take's steps
    REBEL (arXiv 2404.16767)    fit=gap, against=rollout, clip=0: the same; RLCM (arXiv 2404.03673) tunes few-step
                                models by it

Log-probs are means over the dimensions of a sample, as everywhere here: beta and clip do not depend on its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipeline.config.sections.base import NonNegative, Positive
from pipeline.rl.objectives.base import Loss, Objective, Requirements, register
from pipeline.rl.objectives.micro_batch import MicroBatch
from pipeline.rl.samplers.base import log_prob

if TYPE_CHECKING:
    import torch

    from pipeline.rl.objectives.micro_batch import Drawn


@register("trajectory_pairs")
class TrajectoryPairs(Objective):
    """Pairs of takes by l_t = log p(x_next) - log p'(x_next) of their trained steps, p' being the policy of `against`.

    order: -log sigmoid(beta [log rho_w - log rho_l]) at every step, rho = clamp(exp l_t, 1 - clip, 1 + clip).
    gap: (beta [R_w - R_l] - [r_w - r_l])^2, R = sum_t l_t over all trained steps, r the rewards; with a clip the larger
    of this and the same with every l_t held within `clip` of its value under the policy that drew the take.
    """

    fit: Literal["order", "gap"] = Field(
        "order",
        description="Which take is the better one, at each step by itself (D3PO); or by how much, over all trained "
        "steps of a take at once (PRDP, REBEL).",
    )
    against: Literal["start", "rollout"] = Field(
        "start",
        description="Log-ratios are to the policy that the run started from, or to the one that drew the takes.",
    )
    beta: Positive = Field(
        0.1,
        description="How much preference, or reward, a log-ratio of 1 stands for: larger is closer to the policy that "
        "ratios are to. (D3PO 0.1. REBEL's eta. PRDP's loss is this one divided by the square of it.)",
    )
    clip: NonNegative = Field(
        0.1, description="How far a step's ratio (order) or log-ratio (gap) may go and still teach; 0: any distance."
    )

    @model_validator(mode="after")
    def _a_ratio_is_above_0(self) -> TrajectoryPairs:
        if self.fit == "order" and self.clip >= 1.0:
            raise ValueError(f"clip: found {self.clip:g}; with fit=order set less than 1, or 0 for no clip")
        return self

    @property
    def requirements(self) -> Requirements:
        return Requirements(
            draws_noise=True,
            replay_metric="onpolicy/max_abs_log_ratio",
            unit="step" if self.fit == "order" else "trajectory",
            feedback="pairs",
            whole_group=True,
            reference_every=1 if self.against == "start" else 0,
            joins_levels=self.fit == "order",
        )

    @property
    def terms(self) -> dict[str, float]:
        return {"pairs_loss": 1.0}

    @property
    def logged(self) -> tuple[str, ...]:
        return ("pairs_loss", "pairs/accuracy", "pairs/margin", "clip/share")

    def loss(self, micro: MicroBatch) -> Loss:
        return self._order(micro) if self.fit == "order" else self._gap(micro)

    def _order(self, micro: MicroBatch) -> Loss:
        """Of all takes at the micro-batch's steps, which are rows of one denoiser call."""
        import torch

        levels = micro.levels()
        drawn = [level.drawn() for _, level in levels]
        x = torch.cat([each.x for each in drawn])

        def log_probs(output: torch.Tensor) -> torch.Tensor:
            return torch.cat(
                [_log_prob(level, each, output[r]) for (r, level), each in zip(levels, drawn, strict=True)]
            )

        now, old = log_probs(micro.output(x)), torch.cat([each.log_prob for each in drawn])
        other = log_probs(micro.reference_output(x)) if self.against == "start" else old
        log_ratio = now - other
        clipped = log_ratio.clamp(math.log1p(-self.clip), math.log1p(self.clip)) if self.clip else log_ratio
        pairs = micro.pairs
        margin = self.beta * (clipped[pairs.better] - clipped[pairs.worse])
        loss = -pairs.weights * torch.nn.functional.logsigmoid(margin)
        return self._result(micro, loss, margin, clipped != log_ratio, now - old)

    def _gap(self, micro: MicroBatch) -> Loss:
        """Of all takes over all their trained steps. A step's activations are computed again in the backward pass, so
        that those of one step at a time are in memory; the gradient is that of the whole sum."""
        import torch
        from torch.utils.checkpoint import checkpoint

        levels = [level for _, level in micro.levels()]
        drawn = [level.drawn() for level in levels]
        outputs = [
            checkpoint(level.output, each.x, use_reentrant=False, preserve_rng_state=False)
            for level, each in zip(levels, drawn, strict=True)
        ]
        now = _stacked(levels, drawn, outputs)  # [steps, b]
        old = torch.stack([each.log_prob for each in drawn])
        other = old
        if self.against == "start":
            references = [level.reference_output(each.x) for level, each in zip(levels, drawn, strict=True)]
            other = _stacked(levels, drawn, references)
        moved = now - old  # 0 on-policy
        held = moved.clamp(-self.clip, self.clip) if self.clip else moved
        pairs = micro.pairs
        if pairs.gaps is None:
            raise RuntimeError("objective trajectory_pairs: fit=gap needs pairs with reward gaps; set fit=order")

        def margins(of_steps: torch.Tensor) -> torch.Tensor:
            total = of_steps.sum(0)
            return self.beta * (total[pairs.better] - total[pairs.worse])

        margin = margins(now - other)
        loss = (margin - pairs.gaps).pow(2)
        if self.clip:
            loss = loss.maximum((margins(old - other + held) - pairs.gaps).pow(2))
        return self._result(micro, pairs.weights * loss, margin, (held != moved).float().mean(0), moved)

    def _result(
        self, micro: MicroBatch, loss: torch.Tensor, margin: torch.Tensor, clipped: torch.Tensor, error: torch.Tensor
    ) -> Loss:
        """`loss`, `margin` [P]; `clipped` [b]; `error`: replay minus rollout."""
        pairs, takes = micro.pairs, len(clipped)
        logs = {
            "pairs_loss": pairs.per_take(loss.detach(), takes),
            "pairs/accuracy": pairs.per_take((margin.detach() > 0.0).float(), takes),
            "pairs/margin": pairs.per_take(margin.detach(), takes),
            "clip/share": clipped.float(),
        }
        return Loss(pairs.per_take(loss, takes), logs, replay_error=error.detach())


def _log_prob(level: MicroBatch, drawn: Drawn, output: torch.Tensor) -> torch.Tensor:
    """Of what the rollout drew at one trained step [b], for a model output."""
    return log_prob(drawn.x_next, level.transition(drawn.x, output))


def _stacked(levels: Sequence[MicroBatch], drawn: Sequence[Drawn], outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack([_log_prob(*each) for each in zip(levels, drawn, outputs, strict=True)])
