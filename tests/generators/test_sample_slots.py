"""Where the sample is in a denoiser's inputs, found by value, and other samples put there."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.generators.probe.sample_slots import find_sample_slots
from pipeline.generators.record.recording import RawCall
from pipeline.generators.spec import LIST, CallKey, InputKey, Layout

CALL = CallKey(1, 0)
CONDITION = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))


def tiled(copies: int = 1, inner: int = 1) -> Layout:
    return Layout(axis=0, copies=copies, order="tile", inner=inner)


# The sample x [2, 3, 4] -> what the denoiser is given, and how the takes lie in it.
PACKINGS = {
    "itself": (lambda x: x, tiled()),
    "doubled": (lambda x: torch.cat([x, x]), tiled(2)),
    "with channels": (lambda x: torch.cat([x, CONDITION], 1), tiled()),
    "with tokens, doubled": (lambda x: torch.cat([CONDITION, x], 2).repeat(2, 1, 1), tiled(2)),
    "permuted": (lambda x: x.transpose(1, 2), tiled()),
    "folded": (lambda x: x.flatten(0, 1), Layout(axis=0, copies=3, order="repeat")),
    "folded, doubled": (lambda x: torch.cat([x, x]).flatten(0, 1), tiled(2, inner=3)),
    "batch second": (lambda x: torch.cat([x, x]).transpose(0, 1), Layout(axis=1, copies=2, order="tile")),
    "masked": (lambda x: torch.cat([CONDITION[:, :1], x[:, 1:]], 1), tiled()),
    "16 bits": (lambda x: x.bfloat16(), tiled()),
}


def runner(pack):
    """A pipeline that hands its denoiser `pack(x)` and something constant."""

    def run(x: torch.Tensor) -> list[SimpleNamespace]:
        inputs = {"x": pack(x), "text": torch.ones(2, 5)}
        return [SimpleNamespace(index=1, calls=[RawCall("unet", (), inputs, {})])]

    return run


@pytest.mark.parametrize("packing", PACKINGS)
def test_another_sample_goes_where_the_pipeline_would_put_it(packing):
    pack, layout = PACKINGS[packing]
    key = InputKey(CALL, "kwargs.x")
    slots, note = find_sample_slots(runner(pack), torch.Size((2, 3, 4)), torch.float32, {key: layout})
    assert not note and list(slots) == [key]
    old, new = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(2)).unbind(0)
    assert torch.equal(slots[key].fill(pack(old), new, layout), pack(new))
    entries = layout.select(pack(old), [1, 0, 1], 2)
    filled = slots[key].fill(entries, new[[1, 0, 1]], layout)
    assert torch.equal(filled, layout.select(pack(new), [1, 0, 1], 2))


def test_a_list_with_an_entry_per_take():
    key = InputKey(CALL, "kwargs.x")
    layout = Layout(axis=LIST, copies=2, order="tile")

    def pack(x):
        return list(torch.cat([x, x])[:, None].unbind(0))

    slots, note = find_sample_slots(runner(pack), torch.Size((2, 3, 4)), torch.float32, {key: layout})
    assert not note and slots[key].positions.shape == (2, 1, 3, 4)
    new = torch.randn(2, 3, 4)
    filled = slots[key].fill(torch.stack(pack(torch.zeros(2, 3, 4))), new, layout.stacked)
    assert torch.equal(filled, torch.stack(pack(new)))


def test_long_samples_need_several_digits_even_in_bfloat16():
    key = InputKey(CALL, "kwargs.x")
    order = torch.randperm(40_000, generator=torch.Generator().manual_seed(0))
    slots, note = find_sample_slots(
        runner(lambda x: x[:, order]), torch.Size((2, 40_000)), torch.bfloat16, {key: tiled()}
    )
    assert not note and np.array_equal(slots[key].positions[0], order.numpy())


@pytest.mark.parametrize(
    ("pack", "layouts", "reason"),
    [
        (lambda x: x.tanh(), True, "x is computed from the sample"),
        (lambda x: x * 1.5, True, "x is computed from the sample"),
        (lambda x: x.mean(2), True, "x is computed from the sample"),
        (lambda x: torch.cat([x, x.abs()], 1), True, "x is computed from the sample"),
        (lambda x: x.flip(0), True, "x is computed from the sample"),  # of another take
        (lambda x: CONDITION, True, "is not given the sample"),
        (lambda x: x[: 1 + int(x.sum() > 0)], True, "called differently"),
        (lambda x: x, False, "cannot be told apart"),
    ],
)
def test_what_is_no_selection_is_told(pack, layouts, reason):
    key = InputKey(CALL, "kwargs.x")
    known = {key: tiled()} if layouts else None
    slots, note = find_sample_slots(runner(pack), torch.Size((2, 3, 4)), torch.float32, known)
    assert not slots and reason in note


def test_an_input_of_another_shape_than_traced_keeps_its_recorded_sample():
    key = InputKey(CALL, "kwargs.x")
    slots, _ = find_sample_slots(runner(lambda x: x), torch.Size((2, 3, 4)), torch.float32, {key: tiled()})
    longer = torch.randn(2, 3, 5)
    assert not slots[key].fit(longer, tiled(), 2)
    assert slots[key].fill(longer, torch.zeros(2, 3, 4), tiled()) is longer
