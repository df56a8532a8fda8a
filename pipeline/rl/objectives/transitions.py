"""Objectives on recorded transitions x_t -> x_next: policy gradients on the log-probs of the noise that was drawn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from pipeline.config.sections.base import NonNegative, Positive
from pipeline.rl.objectives.base import Loss, Requirements
from pipeline.rl.objectives.micro_batch import MicroBatch
from pipeline.rl.objectives.reference_penalty import WithReference
from pipeline.rl.samplers.base import gaussian_kl, log_prob

if TYPE_CHECKING:
    import torch

    from pipeline.rl.objectives.micro_batch import Drawn
    from pipeline.rl.samplers.base import Transition


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Of b takes, float32 [b] each."""

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
    old_mean: torch.Tensor | None  # [b, ...] of the rollout policy, where the objective requires it
    # The ratio is not of this step's updates: the takes are an earlier version's, or no update came before, so that a
    # fresh take's ratio is 1 but for what rollout and replay round differently in 16 bits.
    stale: bool = False

    def divergence(self) -> torch.Tensor:
        """KL to the rollout policy per dimension [b]. Raises ValueError where its mean was not recorded."""
        if self.old_mean is None:
            raise ValueError("this objective needs the rollout policy's mean, which was not recorded")
        return gaussian_kl(self.step, self.old_mean)

    def against_itself(self) -> TransitionTerms:
        """With the policy in training, as it is, in the place of the rollout policy: every ratio is 1."""
        old_mean = None if self.old_mean is None else self.step.mean.detach()
        return replace(self, old_log_prob=self.log_prob.detach(), old_mean=old_mean)


class TransitionObjective(WithReference):
    """Policy gradient on the log-probs of the noise that the sampler drew; a subclass says how the ratio is used."""

    @property
    def requirements(self) -> Requirements:
        return Requirements(
            draws_noise=True,
            replay_metric="onpolicy/max_abs_log_ratio",
            reference_every=self.reference_every,
            joins_levels=True,
        )

    @property
    def logged(self) -> tuple[str, ...]:
        return (*self.terms, "clip/low", "clip/high")

    @property
    def spread(self) -> tuple[str, ...]:
        return ("ratio", "log_ratio", "advantage")

    @abstractmethod
    def policy_loss(self, terms: TransitionTerms) -> PolicyLoss: ...

    def loss(self, micro: MicroBatch) -> Loss:
        levels = micro.levels()
        drawn = [level.drawn() for _, level in levels]
        x = _joined(each.x for each in drawn)
        output = micro.output(x)
        terms = [self._terms(level, each, output[rows]) for (rows, level), each in zip(levels, drawn, strict=True)]
        policies = [self.policy_loss(each) for each in terms]

        def kl(chosen: slice) -> torch.Tensor:
            """Closed form between Gaussians of equal std, per dimension; only the reference is outside the graph."""
            reference = micro.reference_output(x[chosen], chosen)
            distances = []
            for (rows, level), policy in zip(levels, terms, strict=True):
                if chosen.start <= rows.start < chosen.stop:  # a level's rows are chosen together
                    output = reference[rows.start - chosen.start : rows.stop - chosen.start]
                    distances.append(gaussian_kl(policy.step, level.transition(x[rows], output).mean))
            return _joined(distances)

        total, logs = self.with_reference(_joined(policy.loss for policy in policies), micro, kl)
        clipped = {
            "clip/low": _joined(policy.clipped_low for policy in policies),
            "clip/high": _joined(policy.clipped_high for policy in policies),
        }
        error = _joined((each.log_prob - each.old_log_prob).detach() for each in terms)
        spreads = {
            "ratio": _joined(policy.ratio for policy in policies),
            "log_ratio": error,
            "advantage": micro.advantages,
        }
        return Loss(total, {**logs, **clipped}, spreads, error)

    def _terms(self, level: MicroBatch, drawn: Drawn, output: torch.Tensor) -> TransitionTerms:
        """Of the takes of one trained step."""
        step = level.transition(drawn.x, output)
        log_p = log_prob(drawn.x_next, step)
        stale = level.is_stale or level.only_update
        return TransitionTerms(log_p, drawn.log_prob, level.advantages, step, drawn.mean, stale)

    def summarise(self, spreads: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`offpolicy/*`, of takes that another version of the policy drew, or that 16 bits replay differently: how far
        the ratio is from 1, and whether that has to do with their advantages. A clip drops takes at random where it has
        not."""
        ratio, log_ratio, advantage = (spreads[name].astype(np.float64) for name in self.spread)
        metrics = super().summarise({"ratio": spreads["ratio"]})
        metrics["ratio/max_abs_log"] = float(np.abs(np.log(ratio)).max())
        rms = float(np.sqrt(np.mean(log_ratio**2)))
        if rms > _ON_POLICY:
            metrics["offpolicy/rms_log_ratio"] = rms
            if advantage.std() > 0 and log_ratio.std() > 0:
                metrics["offpolicy/advantage_correlation"] = float(np.corrcoef(log_ratio, advantage)[0, 1])
        return metrics


_ON_POLICY = 1e-5  # log-ratios up to here are rounding, as in the on-policy check


def _joined(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """The rows of all levels, one after another."""
    import torch  # only where a loss is computed: names and checks need no torch

    return torch.cat(list(rows))


class ClippedObjective(TransitionObjective):
    """A transition objective with PPO's clip; a subclass says what the log-ratio is.

    The clip is PPO's bound on the update itself. A take of an earlier version has a ratio other than 1 before the
    update, by what *other* prompts taught since: uncorrelated with its advantage, so the clip would drop it at random
    (with clip 1e-4, about half of all). Such a take is clipped against the policy as the update finds it, and its
    distance from there to the policy that drew it is a weight of its own (decoupled PPO, arXiv 2110.00641).

    The same holds for rounding: on bfloat16 generators log-ratios of 1e-4 to 1e-2 were measured before any update
    (`benchmarks.gpu.families`), more than a clip of 1e-4 lets pass.
    """

    clip_low: Positive = Field(1e-4, description="PPO clip: ratio >= 1 - clip_low.")
    clip_high: Positive = Field(1e-4, description="PPO clip: ratio <= 1 + clip_high.")
    stale: Literal["reweigh", "clip"] = Field(
        "reweigh",
        description="Ratios from before the update, of an earlier version's takes (step.max_staleness) or by rounding "
        "in 16 bits: weigh by them, at most max_weight, and clip what the update adds; or clip the whole ratio.",
    )
    max_weight: Positive = Field(2.0, description="Largest weight of a stale take (truncated importance sampling).")
    reject_above: NonNegative = Field(
        0.0, description="Leave out stale takes whose absolute log-ratio is larger (0: none)."
    )

    def log_ratio(self, terms: TransitionTerms) -> torch.Tensor:
        """log(policy in training / rollout policy) [b], with gradients."""
        return terms.log_prob - terms.old_log_prob

    def policy_loss(self, terms: TransitionTerms) -> PolicyLoss:
        log_ratio = self.log_ratio(terms)
        if not (terms.stale and self.stale == "reweigh"):
            return self.clipped(terms.advantages, log_ratio.exp())
        weight = log_ratio.detach().exp().clamp(max=self.max_weight)
        if self.reject_above:
            weight = weight.masked_fill(log_ratio.detach().abs() > self.reject_above, 0.0)
        return self.clipped(weight * terms.advantages, self.log_ratio(terms.against_itself()).exp())

    def clipped(self, advantages: torch.Tensor, ratio: torch.Tensor) -> PolicyLoss:
        """max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)) (PPO, arXiv 1707.06347 eq. 7), per take."""
        low, high = 1.0 - self.clip_low, 1.0 + self.clip_high
        unclipped = -advantages * ratio
        clipped = -advantages * ratio.clamp(low, high)
        return PolicyLoss(
            loss=unclipped.maximum(clipped),
            ratio=ratio.detach(),
            clipped_low=((ratio < low) & (advantages < 0)).float(),
            clipped_high=((ratio > high) & (advantages > 0)).float(),
        )
