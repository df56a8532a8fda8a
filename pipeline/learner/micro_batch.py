"""The learner's unit of work: takes of one group, at one trained step or at several joined ones in one denoiser call,
or over all trained steps one after another (a trajectory, a tail).

Its inputs are exactly the recorded ones. The learner's ranks divide a step's micro-batches by their specs, so that
none has to read a trajectory of which it replays nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.config.schema import Config
from pipeline.core.types import MicroBatchSpec, RecordedStep, SamplingSpec, Trajectory
from pipeline.generators.replay.merge_steps import merged
from pipeline.generators.replay.replayer import Replayer
from pipeline.learner.policy_store import OLD, REFERENCE
from pipeline.rl.objectives import objective_of
from pipeline.rl.samplers import Transition


@dataclass(frozen=True, slots=True)
class ReplayCall:
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
        return [self.replayer.plain.part.steps[position] for position in self.replayer.positions_of(self.step)]

    @property
    def checks_replay(self) -> bool:
        """Whether it can stand for its trajectory part in the replay check: its first takes at its first step, which
        were drawn."""
        if not self.replayer.plain.part.drawn:
            return False
        return self.joined_steps[0] is self.replayer.plain.part.steps[0] and self.takes.start == 0

    def levels(self) -> list[ReplayCall]:
        """A call for the takes of each joined step, which replays them as recorded; itself where nothing is joined."""
        plain = self.replayer.plain
        if plain is self.replayer:
            return [self]
        return [
            ReplayCall(plain, position, slice(rows.start - number * plain.total, rows.stop - number * plain.total))
            for number, position in enumerate(self.replayer.positions_of(self.step))
            if (rows := self._rows_of(number)) is not None
        ]

    def at_every_step(self) -> list[ReplayCall]:
        """A call for the same takes at each trained step of the part."""
        return [replace(self, step=step) for step in range(len(self.replayer.part.steps))]

    def of_takes(self, takes: slice) -> ReplayCall:
        return replace(self, takes=takes)

    def per_take(self, values: np.ndarray) -> torch.Tensor:
        """`values` [K] of the group's takes -> float32 [b], on the replayer's device."""
        part = self.replayer.plain.part
        repeats = self.replayer.total // self.replayer.plain.total
        chosen = np.tile(values[part.start : part.stop], repeats)[self.takes]
        return torch.from_numpy(np.array(chosen, np.float32)).to(self.replayer.device)

    def model_output(self, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler would be given for the sample [b, ...]."""
        return self.replayer.model_output(self.step, self.takes, sample)

    def transition(self, sample: torch.Tensor, output: torch.Tensor, sampling: SamplingSpec) -> Transition:
        """The Gaussian of the next sample for a model output [b, ...]."""
        return self.replayer.move(self.step, self.takes, sample, output, sampling)

    def takes_at_every(self, nth: int, group: int) -> list[slice]:
        """The takes at every `nth` trained step, a slice for each denoiser call; which steps these are changes with
        the group."""
        slices: list[slice] = []
        for number, position in enumerate(self.replayer.positions_of(self.step)):
            rows = self._rows_of(number)
            if (position + group) % nth == 0 and rows is not None:
                start = slices.pop().start if slices and slices[-1].stop == rows.start else rows.start
                slices.append(slice(start, rows.stop))
        return slices

    def _rows_of(self, number: int) -> slice | None:
        """Those of `takes` that are of the joined step with this number; None: none."""
        total = self.replayer.plain.total
        start, stop = max(self.takes.start, number * total), min(self.takes.stop, (number + 1) * total)
        return slice(start, stop) if start < stop else None


def replay_calls(cfg: Config, replayer: Replayer) -> list[ReplayCall]:
    """Those of a trajectory part, in order; each is a micro-batch. A trajectory's or a tail's stands for all steps by
    its first one."""
    size = cfg.learner.micro_batch or replayer.total
    steps = range(len(replayer.part.steps)) if objective_of(cfg).requirements.unit == "step" else (0,)
    joinable = objective_of(cfg).requirements.joins_levels and not cfg.trainable.trains_text
    if joinable and (joined := merged(replayer, size)):
        return [ReplayCall(several, 0, slice(0, several.total)) for several in joined]
    return [
        ReplayCall(replayer, step, slice(start, min(start + size, replayer.total)))
        for step in steps
        for start in range(0, replayer.total, size)
    ]


def micro_batch_specs(cfg: Config, trajectory: Trajectory) -> tuple[MicroBatchSpec, ...]:
    """What the learner's ranks must know of a trajectory to divide it among themselves."""
    needs = objective_of(cfg).requirements
    specs = []
    for number, part in enumerate(trajectory.parts):
        replayer = Replayer(part, trajectory.spec, {}, torch.device("cpu"))
        for position, micro in enumerate(replay_calls(cfg, replayer)):
            steps = (micro.recorded,) if needs.unit == "step" else part.steps
            modules = [call.module for step in steps for call in step.calls]
            if needs.old_policy:
                modules.append(OLD)
            if nth := needs.reference_every:
                passes = len(micro.takes_at_every(nth, trajectory.group)) if needs.unit == "step" else len(steps)
                modules += [REFERENCE] * passes
            specs.append(
                MicroBatchSpec(
                    part=number,
                    position=position,
                    takes=micro.takes.stop - micro.takes.start,
                    modules=tuple(modules),
                    extra_replay_check=needs.extra_replay_check and micro.checks_replay,
                )
            )
    return tuple(specs)
