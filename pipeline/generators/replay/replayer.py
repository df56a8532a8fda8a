"""Replays a recorded trajectory part in the learner: from stored denoiser inputs back to the scheduler's input.

Replay calls the denoiser with exactly the recorded inputs, so it needs to know nothing about prompts, masks, position
ids or timestep conventions; only which entries belong to which take, and the guidance rule.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.core.tensors import PackedTensor, SampleCopies, SharedSlot, map_leaves, unpack
from pipeline.core.types import RecordedStep, SamplingSpec, TrajectoryPart
from pipeline.generators.noising import consistency_transition
from pipeline.generators.replay.call_inputs import StepRows, run_calls
from pipeline.generators.replay.reencoded import ReencodedInputs
from pipeline.generators.spec import LIST, InputKey, PolicySpec, StepInputKey, call_keys
from pipeline.rl.samplers import NoiseLevels, Transition, transition


def replayed_transition(
    spec: PolicySpec, sampling: SamplingSpec, step: RecordedStep, x: torch.Tensor, out: torch.Tensor
) -> Transition:
    """The Gaussian of a recorded step for another sample or model output; deterministic where no noise was drawn."""
    noisy = step.index in sampling.stochastic_steps
    sigma, sigma_next, cap = step.sigma, step.sigma_next, step.sigma_cap
    if spec.consistency:
        last = step.index == sampling.num_steps - 1 and not noisy
        return consistency_transition(spec.prediction, NoiseLevels(sigma, sigma_next, cap), x, out, last)
    kind = sampling.kind if noisy else "ode"
    return transition(kind, sampling.noise_level, spec.prediction, x, out, sigma, sigma_next, cap)


class Replayer:
    """One trajectory part on the learner's device, replayed step by step, for any subset of its takes."""

    def __init__(
        self, part: TrajectoryPart, spec: PolicySpec, modules: dict[str, torch.nn.Module], device: torch.device
    ) -> None:
        self.part, self.spec, self.modules, self.device = part, spec, modules, device
        self.total = part.stop - part.start  # takes
        self.shared = [unpack(packed, device) for packed in part.shared]
        self.reencoded: ReencodedInputs | None = None  # where text encoders are trained
        self.overrides: dict[StepInputKey, torch.Tensor] = {}  # used in place of the recorded inputs

    @property
    def plain(self) -> Replayer:
        """The replayer of the part as it was recorded (see `merge_steps.MergedReplayer`)."""
        return self

    def positions_of(self, j: int) -> tuple[int, ...]:
        """The positions in `plain`'s part of the trained steps that `j` replays in one call, whose takes follow one
        another."""
        return (j,)

    def samples(self, j: int, takes: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t [b, ...], x_next [b, ...]) of trained step `j`."""
        step = self.part.steps[j]
        return unpack(step.sample, self.device)[takes], unpack(step.next_sample, self.device)[takes]

    def step_tensors(self, j: int, takes: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_t [b, ...], x_next [b, ...], rollout log-prob [b]) of trained step `j`, which drew noise."""
        log_prob = torch.from_numpy(np.array(self.part.steps[j].log_prob)).to(self.device)
        return *self.samples(j, takes), log_prob[takes]

    def clean(self, takes: slice) -> torch.Tensor:
        """The finished latents x0 [b, ...] of the takes."""
        return unpack(self.part.final, self.device)[takes]

    def takes_any_sample(self, j: int) -> bool:
        """Whether another sample can be put into the denoiser inputs of step `j`: the recorded one's place in them was
        traced, and the pipeline puts no values of its own into the sample."""
        step = self.part.steps[j]
        return self.spec.any_sample and step.mask is None and self.has_slots(step)

    def has_slots(self, step: RecordedStep) -> bool:
        """Whether the inputs that hold the sample have the shapes that were traced."""
        for key, call in zip(call_keys(len(step.calls)), step.calls, strict=True):
            leaves: dict[str, Any] = {}
            map_leaves(leaves.setdefault, call.inputs)
            slots = {place: found for place, found in self.spec.sample_slots.items() if place.call == key}
            if not slots:
                return False
            for place, found in slots.items():
                layout = (self.spec.layouts or {}).get(place)
                if layout is not None and layout.axis == LIST:
                    entries = [leaf for path, leaf in leaves.items() if path.startswith(f"{place.path}[")]
                    shape = (len(entries) // self.total, *entries[0].data.shape) if entries else ()
                    if shape != found.positions.shape:
                        return False
                elif isinstance(leaf := leaves.get(place.path), (PackedTensor, SharedSlot)):
                    if not found.fit(self.tensor(leaf), layout, self.total):
                        return False
                elif not isinstance(leaf, SampleCopies):
                    return False
        return True

    def old_mean(self, j: int, takes: slice) -> torch.Tensor:
        """The rollout's mean [b, ...]; only recorded for objectives that need it."""
        return torch.from_numpy(np.array(self.part.steps[j].mean)).to(self.device)[takes]

    def move(self, j: int, takes: slice, x: torch.Tensor, out: torch.Tensor, sampling: SamplingSpec) -> Transition:
        """The Gaussian of trained step `j` for a model output `out`, over the values that the policy chose."""
        step = self.part.steps[j]
        gaussian = replayed_transition(self.spec, sampling, step, x, out)
        if step.mask is None:
            return gaussian
        return replace(gaussian, mask=unpack(step.mask, self.device)[takes])

    def model_output(self, j: int, takes: slice, sample: torch.Tensor) -> torch.Tensor:
        """Calls the denoisers again for trained step `j` and the given takes; `sample`: those takes' x_t [b, ...]."""
        step = self.part.steps[j]
        if len(range(*takes.indices(self.total))) == self.total:
            return self._run(step, None, sample)
        if self.spec.layouts is None:  # the inputs cannot be split by take: replay the whole part
            return self._run(step, None, unpack(step.sample, self.device))[takes]
        return self._run(step, takes, sample)

    def recorded(self, key: StepInputKey) -> torch.Tensor | None:
        """The recorded input; None where there is none, or where it is the step's own sample."""
        step = next(step for step in self.part.steps if step.index == key.step)
        call = step.calls[key.input.call.number]
        leaves: dict[str, Any] = {}
        map_leaves(leaves.setdefault, call.inputs)
        leaf = leaves.get(key.input.path)
        return self.tensor(leaf) if isinstance(leaf, (PackedTensor, SharedSlot)) else None

    def tensor(self, leaf: PackedTensor | SharedSlot) -> torch.Tensor:
        """A recorded input, of all takes, on the device."""
        return self.shared[leaf.index] if isinstance(leaf, SharedSlot) else unpack(leaf, self.device)

    def override(self, step: RecordedStep, key: InputKey) -> torch.Tensor | None:
        """What is used in place of the recorded input, if anything."""
        return self.overrides.get(StepInputKey(step.index, key)) if self.overrides else None

    def _run(self, step: RecordedStep, takes: slice | None, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler received at this step, for the given takes (None: all)."""
        return run_calls([StepRows(self, step, takes)], sample, self.spec, self.modules)
