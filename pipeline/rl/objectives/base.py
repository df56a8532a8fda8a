"""What an objective is: a loss, its options, and what it requires of rollout, recorder, learner and metrics.

Most losses are of two kinds. A `TransitionObjective` sees recorded transitions x_t -> x_next, whose noise the sampler
drew, and their log-probs. A `DenoisingObjective` sees finished takes that are noised again and denoised once. Any other
loss is an `Objective` of its own, on what `MicroBatch` offers.
Nothing here imports torch, so that names and checks are available before a model is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.config.parts import OBJECTIVES, Part
from pipeline.config.sections.sampler import SamplerConfig
from pipeline.core.errors import ConfigError
from pipeline.rl.objectives.micro_batch import MicroBatch

if TYPE_CHECKING:
    import torch

    from pipeline.config.schema import Config

register = OBJECTIVES.register


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirements:
    """What an objective requires. Everything that depends on the objective asks these, never its name."""

    draws_noise: bool  # takes are drawn with the sampler's noise; else without any, by the ODE
    replay_metric: str  # name of the largest difference between replay and rollout
    # Of a micro-batch: takes at one trained step, or at several joined ones; over all of them, each as it was recorded;
    # or over all of them as a chain, run again from the first one's sample.
    unit: Literal["step", "trajectory", "tail"] = "step"
    feedback: Literal["advantages", "pairs", "none"] = "advantages"  # what the signal must give
    reward_gradient: bool = False  # pictures are decoded, and rewards with `gradient` computed, in the learner
    moved_sample: bool = False  # of a tail: denoises samples other than the recorded ones, with gradients to them
    old_mean: bool = False  # the rollout keeps the means of its transitions
    any_sample: bool = False  # denoises samples that no rollout came by
    given_takes: bool = False  # asks for nothing of a take but its finished latents: they may be data
    reference_every: int = 0  # compares every n-th trained step with the starting policy; 0: none
    old_policy: bool = False  # takes are drawn by, and compared with, a slow average of the policy: `old_decay`
    several_prompts: bool = False  # each take of a group is of another prompt
    whole_group: bool = False  # all takes of a group are in one micro-batch
    joins_levels: bool = False  # several trained steps may share one denoiser call
    extra_replay_check: bool = False  # comparing replay with rollout costs an extra forward pass
    samplers: tuple[str, ...] = ()  # those it is defined for; (): all
    min_takes: int = 2  # per group
    pull_to_start: float = 0.0  # with every update the weights move by lr x this towards those they started from
    max_updates: int | None = None  # per step; None: any number
    max_staleness: int | None = None  # of a take; None: any

    @property
    def rollout_policy(self) -> Literal["train", "old"]:
        """Which policy draws the takes."""
        return "old" if self.old_policy else "train"


@dataclass(frozen=True, slots=True)
class Loss:
    """Of the b takes of a micro-batch."""

    total: torch.Tensor  # float32 [b], with gradients
    logs: Mapping[str, torch.Tensor]  # name in `Objective.logged` -> [b], detached: its mean is a metric
    spreads: Mapping[str, torch.Tensor] = field(default_factory=dict)  # name in `Objective.spread` -> [b], detached
    replay_error: torch.Tensor | None = None  # replay minus rollout, any shape; None: not compared


class Objective(Part, ABC):
    """A loss and its requirements. Its fields are its options (`objective.*`)."""

    @property
    @abstractmethod
    def requirements(self) -> Requirements: ...

    @property
    @abstractmethod
    def terms(self) -> dict[str, float]:
        """What the loss is a sum of: names among `logged`, and their weights. Its mean is the metric `loss`."""

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of the values whose means over all (take, trained step) pairs become metrics."""
        return tuple(self.terms)

    @property
    def spread(self) -> tuple[str, ...]:
        """Names of the values that are kept for every pair until `summarise`."""
        return ()

    @abstractmethod
    def loss(self, micro: MicroBatch) -> Loss: ...

    def summarise(self, spreads: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Metrics of the values named in `spread`, float32 [pairs] each, of all updates of a step."""
        return {
            f"{name}/{kind}": float(getattr(values, kind)())
            for name, values in spreads.items()
            for kind in ("mean", "min", "max")
        }

    def tail_steps(self, steps: int, of_step: np.random.Generator, of_group: np.random.Generator) -> range:
        """Where the unit is a tail: those of the `steps` sampler steps that a group trains, the same for all its takes.

        `of_step`: random numbers that all groups of an optimisation step share; `of_group`: the group's own.
        """
        raise NotImplementedError(f"{self.name} trains no tail")

    def old_decay(self, step: int) -> float:
        """How slowly the old policy follows after optimisation step `step`: old := d old + (1 - d) trained."""
        return 0.0

    def check(self, cfg: Config) -> None:
        """Rules of consistency that concern the objective. Raises `ConfigError` naming the key and the fix.

        A subclass adds its rules to these: call `super().check(cfg)`.
        """
        needs = self.requirements
        if needs.draws_noise and needs.samplers and cfg.sampler.kind not in needs.samplers:
            raise ConfigError(f"objective.name: {self.name} needs sampler.kind {' or '.join(needs.samplers)}")
        for key, count, limit in (
            ("step.updates", cfg.step.updates, needs.max_updates),
            ("step.max_staleness", cfg.step.max_staleness, needs.max_staleness),
        ):
            if limit is not None and count > limit:
                raise ConfigError(f"{key}: found {count}; objective {self.name} allows at most {limit}")
        if needs.unit == "tail":
            _check_tail(self.name, cfg)
        if cfg.step.takes < needs.min_takes:
            raise ConfigError(
                f"step.takes: found {cfg.step.takes}; objective {self.name} compares the takes of a group: set "
                f"{needs.min_takes} or more"
            )
        if needs.whole_group:
            for key, takes in (("rollout.batch", cfg.rollout.batch), ("learner.micro_batch", cfg.learner.micro_batch)):
                if 0 < takes < cfg.step.takes:
                    raise ConfigError(
                        f"{key}: found {takes}; objective {self.name} compares all takes of a group in one call: set "
                        f"0, or step.takes ({cfg.step.takes}) or more"
                    )
        if needs.old_policy and cfg.trainable.trains_text:
            raise ConfigError(
                f"trainable.modules: found {cfg.trainable.modules}; objective {self.name} compares policies with the "
                "same text embeddings: set denoiser"
            )
        if not needs.draws_noise and cfg.sampler.same_initial_noise:
            raise ConfigError(
                f"sampler.same_initial_noise: must be false with objective {self.name}, whose takes differ by their "
                "initial noise alone"
            )


def _check_tail(objective: str, cfg: Config) -> None:
    """Which steps a tail trains is the objective's to say, not the window's of steps that draw noise."""
    default = SamplerConfig()
    for key in ("window", "timestep_fraction"):
        if getattr(cfg.sampler, key) != getattr(default, key):
            raise ConfigError(
                f"sampler.{key}: is of no use with objective {objective}, which trains the end of the sampler's chain: "
                "leave it out"
            )
