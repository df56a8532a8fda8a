"""The learner's unit of work: one denoiser call on takes of one group, at one trained step or at several joined ones.

Its inputs are exactly the recorded ones. The learner's ranks divide a step's micro-batches by their specs, so that
none has to read a trajectory of which it replays nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.config.schema import Config
from pipeline.core.types import GroupBatch, MicroBatchSpec, RecordedStep, SamplingSpec, Trajectory
from pipeline.generators.replay.merge_steps import merged
from pipeline.generators.replay.replayer import Replayer
from pipeline.rl.objectives import get_objective
from pipeline.rl.samplers import Transition

REFERENCE = "reference"  # stands in `MicroBatchSpec.modules` for a pass of the reference policy


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The takes `takes` of `replayer` at its trained step number `step`; b of them."""

    replayer: Replayer
    step: int
    takes: slice

    @property
    def recorded(self) -> RecordedStep:
        return self.replayer.part.steps[self.step]

    @property
    def joined_steps(self) -> list[RecordedStep]:
        """The recorded steps replayed in this one call, whose takes follow one another."""
        return self.replayer.steps_of(self.step)

    @property
    def checks_replay(self) -> bool:
        """Whether it can stand for its trajectory part in the replay check: its first takes at its first step."""
        return self.joined_steps[0] is self.replayer.plain.part.steps[0] and self.takes.start == 0

    def unjoined(self) -> MicroBatch:
        """All takes of the first joined step, replayed as recorded; itself where nothing is joined."""
        plain = self.replayer.plain
        return self if plain is self.replayer else MicroBatch(plain, self.step, slice(0, plain.total))

    def of_rows(self, takes: slice) -> MicroBatch:
        return replace(self, takes=takes)

    def advantages(self, group: GroupBatch) -> torch.Tensor:
        """Float32 [b], on the replayer's device."""
        part = self.replayer.plain.part
        repeats = self.replayer.total // self.replayer.plain.total
        chosen = np.tile(group.advantages[part.start : part.stop], repeats)[self.takes]
        return torch.from_numpy(np.array(chosen, np.float32)).to(self.replayer.device)

    def model_output(self, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler would be given for the sample [b, ...]."""
        return self.replayer.model_output(self.step, self.takes, sample)

    def transition(self, sample: torch.Tensor, output: torch.Tensor, sampling: SamplingSpec) -> Transition:
        """The Gaussian of the next sample for a model output [b, ...]."""
        return self.replayer.move(self.step, self.takes, sample, output, sampling)

    def kl_takes(self, cfg: Config, group: int) -> list[slice]:
        """The takes that the KL term compares with the reference, a slice for each call of it.

        They are those of every `kl_every`-th trained step; which steps these are changes with the group.
        """
        if cfg.algorithm.kl_beta == 0:
            return []
        plain = self.replayer.plain
        trained, repeats = [step.index for step in plain.part.steps], plain.total
        slices: list[slice] = []
        for number, step in enumerate(self.joined_steps):
            start = max(self.takes.start, number * repeats)
            stop = min(self.takes.stop, (number + 1) * repeats)
            if (trained.index(step.index) + group) % cfg.algorithm.kl_every == 0 and start < stop:
                if slices and slices[-1].stop == start:
                    start = slices.pop().start
                slices.append(slice(start, stop))
        return slices


def micro_batches_of(cfg: Config, replayer: Replayer) -> list[MicroBatch]:
    """All micro-batches of a trajectory part, in the order in which they are replayed."""
    size = cfg.learner.micro_batch or replayer.total
    joinable = get_objective(cfg.algorithm.objective).joins_steps and cfg.trainable.modules == "denoiser"
    if joinable and (joined := merged(replayer, size)):
        return [MicroBatch(several, 0, slice(0, several.total)) for several in joined]
    return [
        MicroBatch(replayer, step, slice(start, min(start + size, replayer.total)))
        for step in range(len(replayer.part.steps))
        for start in range(0, replayer.total, size)
    ]


def micro_batch_specs(cfg: Config, trajectory: Trajectory) -> tuple[MicroBatchSpec, ...]:
    """What the learner's ranks must know of a trajectory to divide it among themselves."""
    extra_check = get_objective(cfg.algorithm.objective).extra_replay_check
    specs = []
    for number, part in enumerate(trajectory.parts):
        replayer = Replayer(part, trajectory.spec, {}, torch.device("cpu"))
        for position, micro in enumerate(micro_batches_of(cfg, replayer)):
            modules = [call.module for call in micro.recorded.calls]
            modules += [REFERENCE] * len(micro.kl_takes(cfg, trajectory.group))
            specs.append(
                MicroBatchSpec(
                    part=number,
                    position=position,
                    takes=micro.takes.stop - micro.takes.start,
                    modules=tuple(modules),
                    extra_replay_check=extra_check and micro.checks_replay,
                )
            )
    return tuple(specs)
