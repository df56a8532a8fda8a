"""Finds where a take's sample is in every denoiser input, by value: positions are sent through the pipeline in digits.

Stand-ins take the denoisers' place, so only what a pipeline does between its scheduler and its denoiser is run: however
it packs the sample (with further channels or tokens, permuted, folded, in a list), the numbers come out where the
sample's values go. A ControlNet's residuals are computed again (`RecordedCall.before`); what changes with the sample in
any other way belongs to the recorded sample alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.generators.record.inputs import TOLERANCE, denoiser_inputs, relative_difference
from pipeline.generators.record.recording import RawStep
from pipeline.generators.spec import LIST, InputKey, Layout, Layouts, SampleSlots, StepInputKey

_BASE = 128  # positions are sent in digits of this base, which even bfloat16 holds exactly

RunWithSample = Callable[[torch.Tensor], Sequence[RawStep]]  # the steps' common sample [takes, ...] -> kept steps
Inputs = dict[StepInputKey, torch.Tensor]


def find_sample_slots(
    run: RunWithSample, shape: torch.Size, dtype: torch.dtype, layouts: Layouts | None
) -> tuple[dict[InputKey, SampleSlots], str]:
    """(the slots of every input that holds the sample, why another sample cannot be put there; "" where it can).

    `run`: makes the pipeline call with the given samples, [takes, ...] of `shape` and `dtype`, at the steps it keeps.
    """
    if layouts is None:
        return {}, "the takes cannot be told apart in the denoiser's inputs"
    size = shape[1:].numel()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    numbers = [torch.arange(size) // _BASE**digit % _BASE + 1 for digit in range(_digits(size))]
    samples = [row.reshape(shape[1:]).expand(shape).to(dtype) for row in numbers]
    zeros, random, *digits = (_inputs(run(x), layouts) for x in (torch.zeros(shape, dtype=dtype), values, *samples))
    slots: dict[InputKey, SampleSlots] = {}
    for key, zero in zeros.items():
        traced = [random.get(key), *(inputs.get(key) for inputs in digits)]
        if any(leaf is None or leaf.shape != zero.shape for leaf in traced):
            return {}, f"the denoiser is called differently with another sample ({_name(key.input)})"
        leaves = [leaf for leaf in traced if leaf is not None]
        if torch.equal(leaves[0], zero):
            continue
        positions = _trace(zero, leaves[0], leaves[1:], values, layouts.get(key.input))
        if positions is None:
            return {}, f"{_name(key.input)} is computed from the sample"
        known = slots.setdefault(key.input, SampleSlots(positions))
        if not np.array_equal(known.positions, positions):
            return {}, f"{_name(key.input)} holds the sample in an order that changes with the step"
    blind = sorted({key.input.call for key in zeros} - {key.call for key in slots})
    return ({}, f"denoiser call {blind[0]} is not given the sample") if blind else (slots, "")


def _digits(size: int) -> int:
    digits = 1
    while _BASE**digits < size:
        digits += 1
    return digits


def _inputs(steps: Sequence[RawStep], layouts: Layouts) -> Inputs:
    """Floating-point inputs by key; a list with an entry per take is one tensor, its entries stacked."""
    inputs: Inputs = {}
    lists: dict[StepInputKey, list[torch.Tensor]] = {}
    for key, leaf in denoiser_inputs(steps):
        if not leaf.dtype.is_floating_point:
            continue
        parent = InputKey(key.input.call, key.input.path.rpartition("[")[0])
        layout = layouts.get(parent)
        if layout is not None and layout.axis == LIST:
            lists.setdefault(StepInputKey(key.step, parent), []).append(leaf)
        else:
            inputs[key] = leaf
    for key, entries in lists.items():
        if all(entry.shape == entries[0].shape for entry in entries):
            inputs[key] = torch.stack(entries)
    return inputs


def _trace(
    zero: torch.Tensor,
    random: torch.Tensor,
    digits: Sequence[torch.Tensor],
    values: torch.Tensor,
    layout: Layout | None,
) -> np.ndarray | None:
    """`SampleSlots.positions` of one input; None where it is no selection of the sample's values.

    `zero`, `random`, `digits`: the input where the sample is 0, is `values` [takes, ...], holds the positions' digits.
    """
    total, size = values.shape[0], values[0].numel()
    if layout is None and total > 1:
        return None

    def of_take(tensor: torch.Tensor, take: int) -> torch.Tensor:
        return (tensor if layout is None else layout.stacked.select(tensor, [take], total)).double().cpu()

    start = of_take(zero, 0)
    holds = of_take(digits[0], 0) != start
    positions = torch.zeros(start.shape, dtype=torch.long)
    for place, leaf in enumerate(digits):
        digit = of_take(leaf, 0)
        whole = digit.round()
        if bool(((digit != whole) | (whole < 1) | (whole > _BASE) | (start != 0))[holds].any()):
            return None
        positions += (whole.long() - 1) * _BASE**place
    positions[~holds] = -1
    if int(positions.max()) >= size:
        return None
    for take in range(total):
        held = values[take].flatten().to(random.dtype).double()[positions.clamp(min=0)]
        if relative_difference(torch.where(holds, held, of_take(zero, take)), of_take(random, take)) > TOLERANCE:
            return None
    return positions.numpy().astype(np.int32)


def _name(key: InputKey) -> str:
    return key.path.removeprefix("kwargs.")
