"""Packs a recorded pipeline call into the trajectory part that travels from a rollout worker to the learner."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.core.tensors import PackedTensor, SampleCopies, SharedSlot, map_leaves, pack
from pipeline.core.types import CallInputs, RecordedCall, RecordedStep, TrajectoryPart
from pipeline.generators.record.recording import RawCall, RawStep, Recording, TensorId


def pack_recording(
    recording: Recording, start: int, stop: int, keep_mean: bool, call_inputs: CallInputs | None = None
) -> TrajectoryPart:
    """The recorded steps of the takes [start, stop), with inputs that several calls share stored once and the step's
    own sample not at all. `keep_mean`: store each step's mean. Raises RuntimeError before the pipeline has ended."""
    if recording.final is None:
        raise RuntimeError("the pipeline call took no scheduler step")
    steps = recording.steps
    uses = Counter(tensor for step in steps for call in step.calls for tensor in set(call.origin.values()))
    shared: list[PackedTensor] = []
    slots: dict[TensorId, SharedSlot] = {}

    def pack_call(step: RawStep, call: RawCall) -> RecordedCall:
        def pack_leaf(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            copies = _copies_of_sample(leaf, step.sample)
            if copies:
                return SampleCopies(copies)
            tensor = call.origin[path]
            if uses[tensor] < 2:
                return pack(leaf)
            if tensor not in slots:
                slots[tensor] = SharedSlot(len(shared))
                shared.append(pack(leaf))
            return slots[tensor]

        return _recorded(call).with_inputs(map_leaves(pack_leaf, call.inputs))

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
            guidance=step.guidance,
            calls=tuple(pack_call(step, call) for call in step.calls),
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


def pack_conditions(
    recording: Recording, start: int, stop: int, clean: PackedTensor | None, call_inputs: CallInputs | None = None
) -> TrajectoryPart:
    """As `pack_recording`, for a call without denoising: nothing of it was drawn. `clean`: finished latents to go with
    the conditions."""
    part = pack_recording(recording, start, stop, keep_mean=False, call_inputs=call_inputs)
    steps = tuple(replace(step, log_prob=None, mask=None) for step in part.steps)
    return replace(part, steps=steps, final=clean, drawn=False)


def _recorded(call: RawCall) -> RecordedCall:
    """A call whose inputs are still to be packed."""
    before = tuple(_recorded(each) for each in call.before)
    return RecordedCall(
        module=call.module, args=call.args, kwargs=call.kwargs, processors=call.processors, before=before
    )


def _copies_of_sample(leaf: torch.Tensor, sample: torch.Tensor) -> int:
    """n if `leaf` is the sample n times along axis 0 (n = 1, 2, 3), else 0."""
    if leaf.dtype != sample.dtype or leaf.shape[1:] != sample.shape[1:] or leaf.ndim == 0:
        return 0
    for copies in (1, 2, 3):
        if leaf.shape[0] == copies * sample.shape[0] and all(torch.equal(c, sample) for c in leaf.chunk(copies)):
            return copies
    return 0
