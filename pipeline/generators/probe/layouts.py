"""Finds where the takes are in every denoiser input and output, by comparing a batch of 2 with a batch of 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.generators.record.recording import RawStep
from pipeline.generators.spec import LIST, CallKey, InputKey, Layout, call_keys


def layout_between(name: str, two: torch.Tensor, three: torch.Tensor) -> Layout | None:
    """Where the takes are, from the same tensor at batch 2 and batch 3 (the first two takes equal); None: constant.

    Raises UnsupportedPolicyError where no layout explains the difference.
    """
    if two.shape == three.shape:
        return None
    axes = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=False)) if a != b]
    if two.ndim != three.ndim or len(axes) != 1 or two.shape[axes[0]] * 3 != three.shape[axes[0]] * 2:
        raise UnsupportedPolicyError(
            f"{name}: shape {list(two.shape)} for 2 takes and {list(three.shape)} for 3: no single batch axis"
        )
    axis = axes[0]
    per_take = two.shape[axis] // 2
    low_precision = min(two.element_size(), three.element_size()) < 4
    bound = 5e-2 if low_precision else 1e-3
    peak = max(float(two.float().abs().max()), 1e-6) if two.numel() else 1.0
    for layout in _candidate_layouts(axis, per_take):
        difference = layout.select(three, slice(0, 2), 3).double() - two.double()
        if difference.numel() == 0 or float(difference.abs().max()) <= bound * peak:
            return layout
    raise UnsupportedPolicyError(
        f"{name}: takes cannot be told apart along axis {axis} "
        f"(no order of {per_take} x 2 entries matches a batch of 3)"
    )


def _candidate_layouts(axis: int, per_take: int) -> list[Layout]:
    """Ways to lay out `per_take` entries of each take: copies of the batch first, then folded frames, then both."""
    layouts = [
        Layout(axis=axis, copies=per_take, order="tile"),
        Layout(axis=axis, copies=per_take, order="repeat"),
    ]
    for copies in (2, 3, 4):
        if per_take % copies == 0 and per_take > copies:
            layouts.append(Layout(axis=axis, copies=copies, order="tile", inner=per_take // copies))
    return layouts


def _compare(path: str, two: Any, three: Any, report: Callable[[str, Layout], None]) -> None:
    """Walks two recorded input trees and reports where the takes are. Raises UnsupportedPolicyError on any other
    change."""
    if isinstance(two, dict) and isinstance(three, dict) and two.keys() == three.keys():
        for key, value in two.items():
            _compare(f"{path}.{key}" if path else str(key), value, three[key], report)
    elif isinstance(two, (list, tuple)) and isinstance(three, (list, tuple)) and len(two) == len(three):
        for i, (a, b) in enumerate(zip(two, three, strict=True)):
            _compare(f"{path}[{i}]", a, b, report)
    elif isinstance(two, (list, tuple)) and isinstance(three, (list, tuple)) and len(two) * 3 == len(three) * 2:
        for layout in _candidate_layouts(LIST, len(two) // 2):
            selected = layout.select_list(three, slice(0, 2), 3)
            if all(_similar(a, b) for a, b in zip(two, selected, strict=True)):
                report(path, layout)
                return
        raise UnsupportedPolicyError(f"{path}: a list of {len(two)} entries for 2 takes in an unknown order")
    elif isinstance(two, torch.Tensor) and isinstance(three, torch.Tensor):
        tensor_layout = layout_between(path, two, three)
        if tensor_layout is not None:
            report(path, tensor_layout)
    elif isinstance(two, np.ndarray) and isinstance(three, np.ndarray):
        if two.shape != three.shape:
            raise UnsupportedPolicyError(f"{path}: a numpy array that grows with the batch")
    elif type(two) is not type(three) or two != three:
        raise UnsupportedPolicyError(f"{path}: is {_short(two)} for 2 takes and {_short(three)} for 3")


def _similar(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool(torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_similar(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def _short(value: Any) -> str:
    return f"{type(value).__name__}{list(value.shape)}" if hasattr(value, "shape") else repr(value)[:60]


def find_layouts(two: Sequence[RawStep], three: Sequence[RawStep]) -> dict[InputKey, Layout]:
    """Layouts of all call inputs that hold the takes. Raises UnsupportedPolicyError where an input has none."""
    layouts: dict[InputKey, Layout] = {}
    for left, right in zip(two, three, strict=True):
        # Later steps start from samples that differ by rounding, so each call structure is compared once.
        if any(key.call.calls == len(left.calls) for key in layouts):
            continue
        for key, a, b in zip(call_keys(len(left.calls)), left.calls, right.calls, strict=True):

            def report(path: str, layout: Layout, key: CallKey = key) -> None:
                layouts[InputKey(key, path)] = layout

            _compare("", a.inputs, b.inputs, report)
    return layouts


def find_outputs(two: Sequence[RawStep], three: Sequence[RawStep]) -> dict[CallKey, Layout]:
    """Where takes and branches are in each call's output. Raises UnsupportedPolicyError where the calls differ."""
    outputs: dict[CallKey, Layout] = {}
    for left, right in zip(two, three, strict=True):
        names = [call.module for call in left.calls]
        if not names or names != [call.module for call in right.calls]:
            raise UnsupportedPolicyError(
                f"step {left.index} makes {len(names)} denoiser calls for 2 takes and {len(right.calls)} for 3; "
                "the denoiser must be called the same way whatever the batch"
            )
        for key, a, b in zip(call_keys(len(names)), left.calls, right.calls, strict=True):
            if key in outputs:
                continue
            try:
                layout = layout_between(f"{a.module} output", a.first_output, b.first_output)
            except UnsupportedPolicyError as error:
                raise UnsupportedPolicyError(f"{error}; does the model keep state between calls?") from error
            if layout is None or layout.axis != 0:
                raise UnsupportedPolicyError(
                    f"{a.module} output {list(a.first_output.shape)}: the batch is not its first axis"
                )
            outputs[key] = layout
    return outputs


def single_outputs(steps: Sequence[RawStep]) -> dict[CallKey, Layout]:
    """As `find_outputs`, for a pipeline that takes one prompt at a time: an entry of axis 0 is a branch or a frame."""
    outputs: dict[CallKey, Layout] = {}
    for step in steps:
        if not step.calls:
            raise UnsupportedPolicyError(f"step {step.index} makes no denoiser call that could be recorded")
        for key, output in zip(call_keys(len(step.calls)), step.outputs, strict=True):
            entries = output.shape[0]
            folded = entries > 4 or entries == step.sample.shape[1] > 3
            outputs[key] = Layout(axis=0, copies=entries, order="repeat" if folded else "tile")
    return outputs
