"""Finds out how a pipeline works as a policy, by running it twice on small batches and comparing.

Found: where the takes are in every denoiser input and output (a batch of 2 against a batch of 3), how an output is
laid out in what the scheduler is given, and the guidance rule (what reproduces it from the recorded outputs).
Nothing fits: `UnsupportedPolicyError` with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.generators.guidance import LINEAR_FIT, Fit, candidates, evaluate, output_slice_for
from pipeline.generators.record.recorder import RawStep, Recording
from pipeline.generators.replay.replayer import branches_of
from pipeline.generators.spec import LIST, Layout, PolicySpec

RULE_TOLERANCE = 1e-5  # relative to the largest value handed to the scheduler; float32 rules come out at <= 1e-6
LOW_PRECISION_TOLERANCE = 2e-2  # the same where the denoiser runs in 16 bits
RATIO_TOLERANCE = 1e-5  # |log-ratio| on-policy in float32 (design invariant 5)
_TRACE_BASE = 128  # positions are sent through a pipeline in digits of this base, exact even in bfloat16


def tolerance(tensor: torch.Tensor) -> float:
    """How closely a rule has to give what the scheduler received."""
    return RULE_TOLERANCE if tensor.dtype in (torch.float32, torch.float64) else LOW_PRECISION_TOLERANCE


def layout_between(name: str, two: torch.Tensor, three: torch.Tensor) -> Layout | None:
    """Where the takes are, from the same tensor at batch 2 and batch 3 (the first two takes equal); None: constant."""
    if two.shape == three.shape:
        return None
    axes = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=False)) if a != b]
    if two.ndim != three.ndim or len(axes) != 1 or two.shape[axes[0]] * 3 != three.shape[axes[0]] * 2:
        raise UnsupportedPolicyError(
            f"{name}: shape {list(two.shape)} for 2 takes and {list(three.shape)} for 3: no single batch axis"
        )
    axis = axes[0]
    per_take = two.shape[axis] // 2
    low = min(two.element_size(), three.element_size()) < 4
    bound = 5e-2 if low else 1e-3
    peak = max(float(two.float().abs().max()), 1e-6) if two.numel() else 1.0
    for layout in _orders(axis, per_take):
        gap = layout.select(three, slice(0, 2), 3).double() - two.double()
        if gap.numel() == 0 or float(gap.abs().max()) <= bound * peak:
            return layout
    raise UnsupportedPolicyError(
        f"{name}: takes cannot be told apart along axis {axis} "
        f"(no order of {per_take} x 2 entries matches a batch of 3)"
    )


def _orders(axis: int, per_take: int) -> list[Layout]:
    """Ways to lay out `per_take` entries of each take: copies of the batch first, then folded frames, then both."""
    found = [
        Layout(axis=axis, copies=per_take, order="tile"),
        Layout(axis=axis, copies=per_take, order="repeat"),
    ]
    for copies in (2, 3, 4):
        if per_take % copies == 0 and per_take > copies:
            found.append(Layout(axis=axis, copies=copies, order="tile", inner=per_take // copies))
    return found


def _compare(path: str, two: Any, three: Any, found: Callable[[str, Layout], None]) -> None:
    """Walks two recorded input trees; reports where the takes are. Raises UnsupportedPolicyError on other changes."""
    if isinstance(two, dict) and isinstance(three, dict) and two.keys() == three.keys():
        for key, value in two.items():
            _compare(f"{path}.{key}" if path else str(key), value, three[key], found)
    elif isinstance(two, (list, tuple)) and isinstance(three, (list, tuple)) and len(two) == len(three):
        for i, (a, b) in enumerate(zip(two, three, strict=True)):
            _compare(f"{path}[{i}]", a, b, found)
    elif isinstance(two, (list, tuple)) and isinstance(three, (list, tuple)) and len(two) * 3 == len(three) * 2:
        for layout in _orders(LIST, len(two) // 2):
            picked = layout.select_list(three, slice(0, 2), 3)
            if all(_alike(a, b) for a, b in zip(two, picked, strict=True)):
                found(path, layout)
                return
        raise UnsupportedPolicyError(f"{path}: a list of {len(two)} entries for 2 takes whose order is not found")
    elif isinstance(two, torch.Tensor) and isinstance(three, torch.Tensor):
        layout = layout_between(path, two, three)
        if layout is not None:
            found(path, layout)
    elif isinstance(two, np.ndarray) and isinstance(three, np.ndarray):
        if two.shape != three.shape:
            raise UnsupportedPolicyError(f"{path}: a numpy array that grows with the batch")
    elif type(two) is not type(three) or two != three:
        raise UnsupportedPolicyError(f"{path}: is {_short(two)} for 2 takes and {_short(three)} for 3")


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool(torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def _short(value: Any) -> str:
    return f"{type(value).__name__}{list(value.shape)}" if hasattr(value, "shape") else repr(value)[:60]


def find_layouts(two: list[RawStep], three: list[RawStep]) -> tuple[dict[str, Layout] | None, str]:
    """Layouts of all call inputs, by the number of calls a step makes, and a note where there are none."""
    layouts: dict[str, Layout] = {}
    try:
        for left, right in zip(two, three, strict=True):
            # Later steps start from samples that differ by rounding, so each call structure is compared once.
            if any(key.startswith(f"{len(left.calls)}.") for key in layouts):
                continue
            for number, (a, b) in enumerate(zip(left.calls, right.calls, strict=True)):

                def found(path: str, layout: Layout, key: str = f"{len(left.calls)}.{number}") -> None:
                    layouts[f"{key}:{path}"] = layout

                _compare("", {"args": a.args, "kwargs": a.kwargs}, {"args": b.args, "kwargs": b.kwargs}, found)
    except UnsupportedPolicyError as error:
        return None, str(error)
    return layouts, ""


def find_outputs(two: list[RawStep], three: list[RawStep]) -> dict[str, Layout]:
    """Where takes and branches are in each call's output, by the number of calls a step makes."""
    outputs: dict[str, Layout] = {}
    for left, right in zip(two, three, strict=True):
        names = [c.module for c in left.calls]
        if not names or names != [c.module for c in right.calls]:
            raise UnsupportedPolicyError(
                f"step {left.index} makes {len(names)} denoiser calls for 2 takes and {len(right.calls)} for 3; "
                "the denoiser must be called the same way whatever the batch"
            )
        for number, (a, b) in enumerate(zip(left.calls, right.calls, strict=True)):
            key = f"{len(names)}.{number}"
            if key in outputs:
                continue
            try:
                layout = layout_between(f"{a.module} output", a.output, b.output)
            except UnsupportedPolicyError as error:
                raise UnsupportedPolicyError(f"{error}; does the model keep state between calls?") from error
            if layout is None or layout.axis != 0:
                raise UnsupportedPolicyError(
                    f"{a.module} output {list(a.output.shape)}: the batch is not its first axis"
                )
            outputs[key] = layout
    return outputs


def single_outputs(steps: list[RawStep]) -> dict[str, Layout]:
    """The same for a pipeline that takes one prompt at a time: every entry of axis 0 is a branch, or one frame."""
    outputs: dict[str, Layout] = {}
    for step in steps:
        if not step.calls:
            raise UnsupportedPolicyError(f"step {step.index} makes no denoiser call that could be recorded")
        for number, call in enumerate(step.calls):
            entries = call.output.shape[0]
            folded = entries > 4 or entries == step.sample.shape[1] > 3
            outputs[f"{len(step.calls)}.{number}"] = Layout(
                axis=0, copies=entries, order="repeat" if folded else "tile"
            )
    return outputs


def branches_distinguishable(outputs: dict[str, Layout], steps: list[RawStep]) -> bool:
    """Whether the branches of every step differ by so much that a wrong guidance rule or scale shows."""
    for step in steps:
        found: list[torch.Tensor] = []
        for number, call in enumerate(step.calls):
            layout = outputs.get(f"{len(step.calls)}.{number}")
            found += layout.branches(call.output, step.sample.shape[0]) if layout is not None else []
        for i, branch in enumerate(found):
            bound = max(1e-3, tolerance(branch)) * float(branch.abs().max())
            for other in found[:i]:
                if branch.shape == other.shape and float((branch - other).abs().max()) <= bound:
                    return False
    return True


def fit_steps(spec: PolicySpec, steps: list[RawStep], scales: Sequence[float]) -> tuple[dict[str, str], float, float]:
    """The rule for each number of branches met in `steps`: (rules, sign, largest error). Raises with the numbers."""
    by_number: dict[int, list[tuple[RawStep, list[torch.Tensor]]]] = {}
    for step in steps:
        if f"{len(step.calls)}.0" not in spec.outputs:
            raise UnsupportedPolicyError(f"step {step.index} makes {len(step.calls)} denoiser calls, others do not")
        branches = branches_of(spec, [call.output for call in step.calls], step.sample.shape)
        by_number.setdefault(len(branches), []).append((step, branches))
    rules: dict[str, str] = {}
    sign, worst = 1.0, 0.0
    for number, group in by_number.items():
        ranked: dict[tuple[str, float], list[Fit]] = {}
        for step, branches in group:
            best: dict[tuple[str, float], Fit] = {}
            for fit in candidates(branches, step.sample, step.model_output, [step.guidance_scale, *scales]):
                best.setdefault((fit.rule, fit.sign), fit)
            for key, fit in best.items():
                ranked.setdefault(key, []).append(fit)
        everywhere = [max(fits, key=lambda fit: fit.order) for fits in ranked.values() if len(fits) == len(group)]
        order = sorted(everywhere, key=lambda fit: fit.order)
        bound = tolerance(group[0][0].model_output)
        if not order or order[0].error > bound:
            tried = ", ".join(f"{fit.rule} ({fit.error:.1e})" for fit in order[:4]) or "none for that many outputs"
            raise UnsupportedPolicyError(
                f"no guidance rule reproduces what the scheduler receives from {number} denoiser output(s) "
                f"(allowed {bound:.0e}); closest: {tried}"
            )
        rules[str(number)], sign = order[0].rule, order[0].sign
        worst = max(worst, order[0].error)
    return rules, sign, worst


def find_rule(steps: list[RawStep], outputs: list[Layout], nominal: float) -> tuple[str, str, float | None, float]:
    """(rule, cut, scale of the first step, largest relative error) for steps whose outputs are laid out as given."""
    spec = bare_spec(steps[0], {f"{len(outputs)}.{i}": layout for i, layout in enumerate(outputs)}, "", "flow")
    rules, sign, error = fit_steps(spec, steps, [nominal])
    branches = branches_of(spec, [call.output for call in steps[0].calls], steps[0].sample.shape)
    found = fit_step(branches, steps[0], rules[str(len(branches))], sign, [nominal])
    return found.rule, spec.output_slice, found.scale, error


def fit_step(branches: list[torch.Tensor], step: RawStep, rule: str, sign: float, scales: Sequence[float]) -> Fit:
    """The numbers of a known rule at one step."""
    ranked = candidates(branches, step.sample, step.model_output, [step.guidance_scale, *scales])
    fits = [fit for fit in ranked if fit.rule == rule and (fit.sign == sign or rule == LINEAR_FIT)]
    if not fits or fits[0].error > tolerance(step.model_output):
        raise _unfit(step, rule, f"{fits[0].error:.1e}" if fits else "it does not apply")
    return fits[0]


def check_numbers(
    branches: list[torch.Tensor], step: RawStep, rule: str, scale: float, extra: tuple[float, ...], sign: float
) -> None:
    """Raises UnsupportedPolicyError where a rule with known numbers does not give what the scheduler received."""
    gap = (evaluate(rule, branches, step.sample, scale, extra, sign) - step.model_output).abs().max()
    error = float(gap) / (float(step.model_output.abs().max()) or 1.0)
    if not error <= tolerance(step.model_output):
        raise _unfit(step, rule, f"{error:.1e}")


def _unfit(step: RawStep, rule: str, error: str) -> UnsupportedPolicyError:
    return UnsupportedPolicyError(
        f"step {step.index}: the guidance rule '{rule}' found at start-up does not reproduce what the scheduler "
        f"receives ({error}; allowed {tolerance(step.model_output):.0e})"
    )


def bare_spec(step: RawStep, outputs: dict[str, Layout], pipeline: str, prediction: str) -> PolicySpec:
    """A spec without rules, its cut read from shapes ("gather" where they do not say)."""
    layout = outputs[f"{len(step.calls)}.0"]
    shape = layout.branches(step.calls[0].output, step.sample.shape[0])[0].shape
    return PolicySpec(
        pipeline=pipeline,
        prediction=prediction,
        rules={},
        sign=1.0,
        output_slice=output_slice_for(shape, step.sample.shape) or "gather",
        gather=None,
        layouts=None,
        outputs=outputs,
    )


def trace_output(
    run: Callable[[Callable[[int, str, torch.Tensor], torch.Tensor]], Recording],
    outputs: dict[str, Layout],
    takes: int,
) -> np.ndarray:
    """For each value the scheduler is given: which value of a branch's output it comes from (int32, sample's shape).

    `run` makes the pipeline call with denoiser outputs replaced. All branches and takes carry the same numbers, the
    positions in digits, so that guidance leaves them as they are and only slicing, unpacking and signs remain.
    Raises UnsupportedPolicyError when the numbers do not come out whole.
    """
    layout = next(iter(outputs.values()))
    place: torch.Tensor | None = None
    digit, size = 0, 1
    while digit == 0 or _TRACE_BASE**digit < size:

        def send(_step: int, _name: str, output: torch.Tensor, digit: int = digit) -> torch.Tensor:
            nonlocal size
            branch = layout.branches(output, takes)[0]
            size = branch[0].numel()
            numbers = torch.arange(size, device=output.device) // _TRACE_BASE**digit % _TRACE_BASE + 1
            inner = layout.copies if layout.order == "repeat" else layout.inner
            rows = numbers.reshape(inner, -1) if inner > 1 else numbers.reshape(1, -1)
            return rows.repeat(output.shape[0] // rows.shape[0], 1).reshape(output.shape).to(output.dtype)

        received = run(send).steps[0].model_output[0].double().cpu().abs()
        whole = received.round()
        gap = float((received - whole).abs().max())
        if gap > 0.1 or float(whole.min()) < 1 or float(whole.max()) > _TRACE_BASE:
            raise UnsupportedPolicyError(
                "what the scheduler receives is not a selection of the denoiser's output values (positions sent "
                f"through the pipeline came back off by {gap:.2g}); it depends on more than guidance"
            )
        part = (whole - 1).long() * _TRACE_BASE**digit
        place = part if place is None else place + part
        digit += 1
    if int(place.max()) >= size:
        raise UnsupportedPolicyError("what the scheduler receives could not be traced back to the denoiser's output")
    return place.numpy().astype(np.int32)


def check_linear_weights(spec: PolicySpec, one: list[RawStep], other: list[RawStep]) -> None:
    """Weights of a linear fit must be the same for other takes, or they are not numbers but functions of the outputs
    (normalisation, momentum), and replay would have the wrong gradient. Raises UnsupportedPolicyError."""
    for a, b in zip(one, other, strict=True):
        weights = []
        for step in (a, b):
            branches = branches_of(spec, [call.output for call in step.calls], step.sample.shape)
            if spec.rules[str(len(branches))] != LINEAR_FIT:
                break
            weights.append(fit_step(branches, step, LINEAR_FIT, 1.0, []).extra)
        if len(weights) == 2 and not np.allclose(*weights, rtol=1e-3, atol=1e-3):
            raise UnsupportedPolicyError(
                f"step {a.index}: guidance weights differ between takes ({_numbers(weights[0])} and "
                f"{_numbers(weights[1])}); they depend on the outputs themselves, which no known rule reproduces"
            )


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def report(spec: PolicySpec, small: Recording, large: Recording, error: float) -> dict[str, Any]:
    """What was found and measured, as plain data."""
    steps = small.steps + large.steps
    return {
        "pipeline": spec.pipeline,
        "prediction": spec.prediction,
        "guidance_rule": " / ".join(dict.fromkeys(spec.rules.values())) + (", negated" if spec.sign < 0 else ""),
        "guidance_scale": large.steps[0].guidance_scale,
        "guidance_weights": list(large.steps[0].rule_extra),
        "guidance_error": error,
        "output_slice": spec.output_slice,
        "denoiser_calls_per_step": max(len(step.calls) for step in steps),
        "denoisers": sorted({call.module for step in steps for call in step.calls}),
        "takes_axis": {path: [v.axis, v.copies, v.order] for path, v in (spec.layouts or {}).items()},
        "chosen_share": min(small.chosen_share, large.chosen_share),
        "sample_shape": list(large.steps[0].sample.shape[1:]),
    }
