"""From a recording to a trajectory (rollout side), and from a trajectory back to the scheduler's input (learner side).

Replay calls the denoiser with exactly the recorded inputs, so nothing about prompts, masks, position ids or timestep
conventions is known here; only which entries belong to which take, and the guidance rule.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.core.tensors import PackedTensor, SampleSlot, SharedSlot, map_leaves, pack, unpack
from pipeline.core.types import CallInputs, RecordedCall, RecordedStep, SamplingSpec, TrajectoryPart
from pipeline.generators.guidance import OUTPUT_SLICES, evaluate
from pipeline.generators.record.attention import apply_processors
from pipeline.generators.record.outputs import first_tensor
from pipeline.generators.record.recorder import RawStep, Recording
from pipeline.generators.spec import PolicySpec, map_call_inputs
from pipeline.rl.samplers import Transition, transition

if TYPE_CHECKING:
    from pipeline.generators.replay.text_inputs import ReencodedInputs


def to_part(
    recording: Recording, start: int, stop: int, keep_mean: bool, call_inputs: CallInputs | None = None
) -> TrajectoryPart:
    """Packs recorded steps: inputs met in several calls are stored once, the step's own sample not at all."""
    steps = recording.steps
    uses = Counter(key for step in steps for call in step.calls for key in set(call.origin.values()))
    shared: list[PackedTensor] = []
    slots: dict[tuple[int, int], SharedSlot] = {}

    def packed_call(step: RawStep, call: Any) -> RecordedCall:
        def place(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            copies = _copies_of(leaf, step.sample)
            if copies:
                return SampleSlot(copies)
            key = call.origin[path]
            if uses[key] < 2:
                return pack(leaf)
            if key not in slots:
                slots[key] = SharedSlot(len(shared))
                shared.append(pack(leaf))
            return slots[key]

        tree = map_leaves(place, {"args": call.args, "kwargs": call.kwargs})
        return RecordedCall(module=call.module, args=tree["args"], kwargs=tree["kwargs"], processors=call.processors)

    recorded = tuple(
        RecordedStep(
            index=step.index,
            sigma=step.sigma,
            sigma_next=step.sigma_next,
            sigma_cap=step.sigma_cap,
            sample=pack(step.sample),
            next_sample=pack(step.next_sample),
            log_prob=None if step.log_prob is None else np.asarray(step.log_prob.cpu(), np.float32),
            mean=np.array(step.mean.cpu(), np.float32) if keep_mean else None,
            guidance_scale=step.guidance_scale,
            calls=tuple(packed_call(step, call) for call in step.calls),
            rule=step.rule,
            rule_extra=step.rule_extra,
            mask=None if step.mask is None else pack(step.mask),
        )
        for step in steps
    )
    return TrajectoryPart(
        start=start,
        stop=stop,
        steps=recorded,
        shared=tuple(shared),
        final=pack(recording.final),
        call_inputs=call_inputs,
    )


def _copies_of(leaf: torch.Tensor, sample: torch.Tensor) -> int:
    """n if `leaf` is the sample n times along axis 0 (n = 1, 2, 3), else 0."""
    if leaf.dtype != sample.dtype or leaf.shape[1:] != sample.shape[1:] or leaf.ndim == 0:
        return 0
    for copies in (1, 2, 3):
        if leaf.shape[0] == copies * sample.shape[0] and all(torch.equal(c, sample) for c in leaf.chunk(copies)):
            return copies
    return 0


def branches_of(spec: PolicySpec, outputs: list[torch.Tensor], like: torch.Size) -> list[torch.Tensor]:
    """Denoiser outputs of one step -> one tensor per guidance branch, in the sample's shape `like` [B, ...]."""
    total, found = like[0], []
    for number, output in enumerate(outputs):
        for branch in spec.outputs[f"{len(outputs)}.{number}"].branches(output, total):
            if spec.output_slice == "gather":
                places = torch.from_numpy(spec.gather).to(branch.device).flatten().long()
                found.append(branch.flatten(1).index_select(1, places).reshape(like))
            else:
                found.append(OUTPUT_SLICES[spec.output_slice](branch, like))
    return found


class Replayer:
    """One trajectory part on the learner's device, replayed step by step, for any subset of its takes."""

    def __init__(
        self, part: TrajectoryPart, spec: PolicySpec, modules: dict[str, torch.nn.Module], device: torch.device
    ) -> None:
        self.part, self.spec, self.modules, self.device = part, spec, modules, device
        self.total = part.stop - part.start
        self.shared = [unpack(packed, device) for packed in part.shared]
        self.reencoded: ReencodedInputs | None = None  # fresh text inputs, where text encoders are trained
        # (sampler step, "<calls>.<call>:<path>") -> an input that takes the recorded one's place
        self.overrides: dict[tuple[int, str], torch.Tensor] = {}

    @property
    def plain(self) -> Replayer:
        """The replayer of the part as it was recorded; `pipeline.generators.replay.merge_steps` has another kind."""
        return self

    def steps_of(self, j: int) -> list[RecordedStep]:
        """The recorded steps that `j` replays in one call, whose takes follow one another."""
        return [self.part.steps[j]]

    def samples(self, j: int, takes: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t [b, ...], x_next [b, ...]) of trained step `j`."""
        step = self.part.steps[j]
        return unpack(step.sample, self.device)[takes], unpack(step.next_sample, self.device)[takes]

    def step_tensors(self, j: int, takes: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_t [b, ...], x_next [b, ...], rollout log-prob [b]) of trained step `j`, which drew noise."""
        old = torch.from_numpy(np.array(self.part.steps[j].log_prob)).to(self.device)
        return *self.samples(j, takes), old[takes]

    def clean(self, takes: slice) -> torch.Tensor:
        """The finished latents x0 [b, ...] of the takes."""
        return unpack(self.part.final, self.device)[takes]

    def takes_any_sample(self, j: int) -> bool:
        """Whether the denoisers of step `j` are given the sample itself, so that another one can be put in."""

        def is_slot(call: RecordedCall) -> bool:
            found: list[bool] = []
            map_leaves(lambda _, leaf: found.append(isinstance(leaf, SampleSlot)), [call.args, call.kwargs])
            return any(found)

        step = self.part.steps[j]
        return step.mask is None and all(is_slot(call) for call in step.calls)

    def old_mean(self, j: int, takes: slice) -> torch.Tensor:
        """The rollout's mean [b, ...]; only recorded for objectives that need it."""
        return torch.from_numpy(np.array(self.part.steps[j].mean)).to(self.device)[takes]

    def move(self, j: int, takes: slice, x: torch.Tensor, out: torch.Tensor, sampling: SamplingSpec) -> Transition:
        """The Gaussian of trained step `j` for a model output `out`, over the values that the policy chose."""
        step = self.part.steps[j]
        moved = transition(
            sampling.kind,
            sampling.noise_level,
            self.spec.prediction,
            x,
            out,
            step.sigma,
            step.sigma_next,
            step.sigma_cap,
        )
        if step.mask is None:
            return moved
        return Transition(moved.mean, moved.std, moved.dt, unpack(step.mask, self.device)[takes])

    def model_output(self, j: int, takes: slice, sample: torch.Tensor) -> torch.Tensor:
        """Calls the denoisers again for trained step `j` and the given takes; `sample`: those takes' x_t."""
        step = self.part.steps[j]
        if len(range(*takes.indices(self.total))) == self.total:
            return self._run(step, None, sample)
        if self.spec.layouts is None:  # takes cannot be told apart in the inputs: the whole part, then those takes
            return self._run(step, None, unpack(step.sample, self.device))[takes]
        return self._run(step, takes, sample)

    def recorded(self, index: int, key: str) -> torch.Tensor | None:
        """The recorded input `key` ("<calls>.<call>:<path>") of sampler step `index`; None where there is none, or
        where it is the step's own sample."""
        call_key, path = key.split(":", 1)
        calls = next(step.calls for step in self.part.steps if step.index == index)
        call, found = calls[int(call_key.split(".")[1])], {}
        map_leaves(found.setdefault, {"args": call.args, "kwargs": call.kwargs})
        leaf = found.get(path)
        if isinstance(leaf, SharedSlot):
            return self.shared[leaf.index]
        return unpack(leaf, self.device) if isinstance(leaf, PackedTensor) else None

    def _run(self, step: RecordedStep, takes: slice | None, sample: torch.Tensor) -> torch.Tensor:
        layouts = self.spec.layouts if takes is not None else {}
        outputs = []
        for number, call in enumerate(step.calls):
            key = f"{len(step.calls)}.{number}"

            def resolve(path: str, leaf: Any, key: str = key) -> Any:
                fresh = self.overrides.get((step.index, f"{key}:{path}"))
                if fresh is not None:
                    tensor = fresh
                elif isinstance(leaf, SampleSlot):
                    return torch.cat([sample] * leaf.copies) if leaf.copies > 1 else sample
                elif isinstance(leaf, SharedSlot):
                    tensor = self.shared[leaf.index]
                elif isinstance(leaf, PackedTensor):
                    tensor = unpack(leaf, self.device)
                else:
                    return leaf
                layout = layouts.get(f"{key}:{path}")
                return tensor if layout is None else layout.select(tensor, takes, self.total)

            tree = map_call_inputs(
                {"args": call.args, "kwargs": call.kwargs}, "", layouts, key, takes, self.total, resolve
            )
            apply_processors(self.modules[call.module], call.processors)
            outputs.append(first_tensor(self.modules[call.module](*tree["args"], **tree["kwargs"])))
        branches = branches_of(self.spec, outputs, sample.shape)
        return evaluate(step.rule, branches, sample, step.guidance_scale, step.rule_extra, self.spec.sign)
