"""Fits the guidance rule: what reproduces the scheduler's input from the recorded denoiser outputs.

Also finds how an output is sliced to the scheduler's sample, where shapes do not tell. Where nothing fits,
`UnsupportedPolicyError` is raised with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import StepGuidance
from pipeline.generators.guidance import LINEAR_FIT, Fit, candidates, evaluate, output_slice_for
from pipeline.generators.record.recording import RawStep, Recording
from pipeline.generators.spec import CallKey, Layout, PolicySpec, call_keys

RULE_TOLERANCE = 1e-5  # relative to the largest value handed to the scheduler; float32 rules come out at <= 1e-6
LOW_PRECISION_TOLERANCE = 2e-2  # the same where the denoiser runs in 16 bits
_TRACE_BASE = 128  # positions are sent through a pipeline in digits of this base, exact even in bfloat16

ReplaceOutput = Callable[[int, str, torch.Tensor], torch.Tensor]  # (step, module name, output) -> output


@dataclass(frozen=True, slots=True)
class FittedRules:
    """The guidance rules of a pipeline."""

    rules: dict[int, str]  # number of branches in a step -> rule
    sign: float  # -1: the pipeline hands the scheduler the negated value
    error: float  # largest, relative to the largest value handed to the scheduler
    float_outputs: bool = False  # outputs of 16 bits are made float32 before they are combined


def tolerance(*tensors: torch.Tensor) -> float:
    """How closely a rule has to reproduce what the scheduler received, given that and the branches."""
    full = all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)
    return RULE_TOLERANCE if full else LOW_PRECISION_TOLERANCE


def branches_distinguishable(outputs: Mapping[CallKey, Layout], steps: Sequence[RawStep]) -> bool:
    """Whether the branches of every step differ by so much that a wrong guidance rule or scale shows."""
    for step in steps:
        branches: list[torch.Tensor] = []
        for key, call in zip(call_keys(len(step.calls)), step.calls, strict=True):
            layout = outputs.get(key)
            branches += layout.branches(call.first_output, step.sample.shape[0]) if layout is not None else []
        for i, branch in enumerate(branches):
            bound = max(1e-3, tolerance(branch)) * float(branch.abs().max())
            for other in branches[:i]:
                if branch.shape == other.shape and float((branch - other).abs().max()) <= bound:
                    return False
    return True


def fit_rules(spec: PolicySpec, steps: Sequence[RawStep], scales: Sequence[float]) -> FittedRules:
    """The best rule for each number of branches met in `steps`. Raises UnsupportedPolicyError with the numbers.

    Where the scheduler receives float32 of a denoiser in 16 bits, it is found out whether the pipeline combines the
    outputs before or after it makes them float32.
    """
    first = steps[0]
    if tolerance(first.model_output) < tolerance(*first.outputs):
        try:
            return replace(_fit_rules(replace(spec, float_outputs=True), steps, scales), float_outputs=True)
        except UnsupportedPolicyError:
            pass  # it combines them in 16 bits
    return _fit_rules(spec, steps, scales)


def _fit_rules(spec: PolicySpec, steps: Sequence[RawStep], scales: Sequence[float]) -> FittedRules:
    by_number: dict[int, list[tuple[RawStep, list[torch.Tensor]]]] = {}
    for step in steps:
        if CallKey(len(step.calls), 0) not in spec.outputs:
            raise UnsupportedPolicyError(f"step {step.index} makes {len(step.calls)} denoiser calls, others do not")
        branches = spec.branches(step.outputs, step.sample.shape)
        by_number.setdefault(len(branches), []).append((step, branches))
    rules: dict[int, str] = {}
    sign, worst = 1.0, 0.0
    for number, group in by_number.items():
        fits: dict[tuple[str, float], list[Fit]] = {}  # (rule, sign) -> its best fit at each step
        for step, branches in group:
            best: dict[tuple[str, float], Fit] = {}
            for fit in candidates(branches, step.sample, step.model_output, [step.guidance.scale, *scales]):
                best.setdefault((fit.rule, fit.sign), fit)
            for rule, fit in best.items():
                fits.setdefault(rule, []).append(fit)
        at_every_step = [max(each, key=lambda fit: fit.order) for each in fits.values() if len(each) == len(group)]
        ranked = sorted(at_every_step, key=lambda fit: fit.order)
        bound = tolerance(group[0][0].model_output, *group[0][1])
        if not ranked or ranked[0].error > bound:
            tried = ", ".join(f"{fit.rule} ({fit.error:.1e})" for fit in ranked[:4]) or "none for that many outputs"
            raise UnsupportedPolicyError(
                f"no guidance rule reproduces what the scheduler receives from {number} denoiser output(s) "
                f"(allowed {bound:.0e}); closest: {tried}"
            )
        rules[number], sign = ranked[0].rule, ranked[0].sign
        worst = max(worst, ranked[0].error)
    return FittedRules(rules, sign, worst)


def fit_guidance(
    branches: list[torch.Tensor], step: RawStep, rule: str, sign: float, scales: Sequence[float]
) -> StepGuidance:
    """The numbers of a known rule at one step. Raises UnsupportedPolicyError where it does not fit."""
    ranked = candidates(branches, step.sample, step.model_output, [step.guidance.scale, *scales])
    fits = [fit for fit in ranked if fit.rule == rule and (fit.sign == sign or rule == LINEAR_FIT)]
    allowed = tolerance(step.model_output, *branches)
    if not fits or fits[0].error > allowed:
        raise _does_not_fit(step, rule, f"{fits[0].error:.1e}" if fits else "it does not apply", allowed)
    return fits[0].guidance


def check_guidance(branches: list[torch.Tensor], step: RawStep, guidance: StepGuidance, sign: float) -> None:
    """Raises UnsupportedPolicyError where a rule with these numbers does not give what the scheduler received."""
    difference = (evaluate(guidance, branches, step.sample, sign) - step.model_output).abs().max()
    error = float(difference) / (float(step.model_output.abs().max()) or 1.0)
    if not error <= (allowed := tolerance(step.model_output, *branches)):
        raise _does_not_fit(step, guidance.rule, f"{error:.1e}", allowed)


def _does_not_fit(step: RawStep, rule: str, error: str, allowed: float) -> UnsupportedPolicyError:
    return UnsupportedPolicyError(
        f"step {step.index}: the guidance rule '{rule}' found at start-up does not reproduce what the scheduler "
        f"receives ({error}; allowed {allowed:.0e})"
    )


def check_linear_weights(spec: PolicySpec, steps: Sequence[RawStep], others: Sequence[RawStep]) -> None:
    """Compares the weights of a linear fit between two recordings with different takes.

    Weights that differ are functions of the outputs (normalisation, momentum), and replay would have the wrong
    gradient. Raises UnsupportedPolicyError.
    """
    for a, b in zip(steps, others, strict=True):
        weights = []
        for step in (a, b):
            branches = spec.branches(step.outputs, step.sample.shape)
            if spec.rules[len(branches)] != LINEAR_FIT:
                break
            weights.append(fit_guidance(branches, step, LINEAR_FIT, 1.0, []).extra)
        if len(weights) == 2 and not np.allclose(weights[0], weights[1], rtol=1e-3, atol=1e-3):
            raise UnsupportedPolicyError(
                f"step {a.index}: guidance weights differ between takes ({_listed(weights[0])} and "
                f"{_listed(weights[1])}); they depend on the outputs themselves, which no known rule reproduces"
            )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def bare_spec(step: RawStep, outputs: dict[CallKey, Layout], pipeline: str, prediction: str) -> PolicySpec:
    """A spec without rules, its output slice read from shapes ("gather" where they do not tell)."""
    layout = outputs[CallKey(len(step.calls), 0)]
    shape = layout.branches(step.outputs[0], step.sample.shape[0])[0].shape
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
    run: Callable[[ReplaceOutput], Recording], outputs: Mapping[CallKey, Layout], takes: int
) -> np.ndarray:
    """For each value the scheduler receives: which value of a branch's output it comes from (int32, sample's shape).

    `run` makes the pipeline call with denoiser outputs replaced. All branches and takes carry the same numbers, the
    positions in digits, so that guidance leaves them as they are and only slicing, unpacking and signs remain.
    Raises UnsupportedPolicyError when the numbers do not come out whole.
    """
    layout = next(iter(outputs.values()))
    positions: torch.Tensor | None = None
    digit, size = 0, 1
    while positions is None or _TRACE_BASE**digit < size:

        def send_digit(_step: int, _name: str, output: torch.Tensor, digit: int = digit) -> torch.Tensor:
            nonlocal size
            branch = layout.branches(output, takes)[0]
            size = branch[0].numel()
            numbers = torch.arange(size, device=output.device) // _TRACE_BASE**digit % _TRACE_BASE + 1
            inner = layout.copies if layout.order == "repeat" else layout.inner
            rows = numbers.reshape(inner, -1) if inner > 1 else numbers.reshape(1, -1)
            return rows.repeat(output.shape[0] // rows.shape[0], 1).reshape(output.shape).to(output.dtype)

        received = run(send_digit).steps[0].model_output[0].double().cpu().abs()
        whole = received.round()
        error = float((received - whole).abs().max())
        if error > 0.1 or float(whole.min()) < 1 or float(whole.max()) > _TRACE_BASE:
            raise UnsupportedPolicyError(
                "what the scheduler receives is not a selection of the denoiser's output values (positions sent "
                f"through the pipeline came back off by {error:.2g}); it depends on more than guidance"
            )
        digit_values = (whole - 1).long() * _TRACE_BASE**digit
        positions = digit_values if positions is None else positions + digit_values
        digit += 1
    if int(positions.max()) >= size:
        raise UnsupportedPolicyError("what the scheduler receives could not be traced back to the denoiser's output")
    return positions.numpy().astype(np.int32)
