"""Finds out how a pipeline works as a policy, by running it twice on small batches and comparing.

Found: where the takes are in every denoiser input and output (a batch of 2 against a batch of 3), the guidance rule
(what reproduces the scheduler's input from the recorded outputs), and that replay repeats the rollout's log-probs.
Nothing fits: `UnsupportedPolicyError` with the numbers.
"""

from __future__ import annotations

import torch

from pipeline.errors import UnsupportedPolicyError
from pipeline.generators.guidance import CUTS, LINEAR, RULES, cut_for, solve_scale
from pipeline.generators.recorder import RawStep, Recording
from pipeline.generators.spec import Layout, PolicySpec
from pipeline.wire import map_leaves

RULE_TOLERANCE = 1e-5  # relative to the largest value handed to the scheduler; float32 rules come out at <= 1e-6
RATIO_TOLERANCE = 1e-5  # |log-ratio| on-policy in float32 (design invariant 5)


def leaves(tree) -> dict[str, object]:
    """path -> leaf of a tree."""
    found: dict[str, object] = {}
    map_leaves(lambda path, leaf: found.setdefault(path, leaf), tree)
    return found


def layout_between(name: str, two: torch.Tensor, three: torch.Tensor) -> Layout | None:
    """Where the takes are, from the same tensor at batch 2 and batch 3 (the first two takes equal); None: constant."""
    if two.shape == three.shape:
        return None
    axes = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=False)) if a != b]
    if two.ndim != three.ndim or len(axes) != 1 or two.shape[axes[0]] * 3 != three.shape[axes[0]] * 2:
        raise UnsupportedPolicyError(
            f"{name}: shape {list(two.shape)} for 2 takes and {list(three.shape)} for 3: no single batch axis"
        )
    axis, copies = axes[0], two.shape[axes[0]] // 2
    for order in ("tile", "repeat"):
        layout = Layout(axis=axis, copies=copies, order=order)
        if torch.allclose(layout.take(three, slice(0, 2), 3).float(), two.float(), rtol=1e-4, atol=1e-4):
            return layout
    raise UnsupportedPolicyError(
        f"{name}: takes cannot be told apart along axis {axis} "
        f"(neither order of {copies} x 2 entries matches a batch of 3)"
    )


def find_layouts(two: RawStep, three: RawStep) -> tuple[dict[str, Layout], list[Layout]]:
    """Layouts of the inputs and outputs of one step's calls."""
    if [c.module for c in two.calls] != [c.module for c in three.calls] or not two.calls:
        raise UnsupportedPolicyError(
            f"denoiser calls per step depend on the batch: {len(two.calls)} for 2 takes, {len(three.calls)} for 3"
        )
    layouts: dict[str, Layout] = {}
    outputs: list[Layout] = []
    for number, (a, b) in enumerate(zip(two.calls, three.calls, strict=True)):
        left, right = leaves({"args": a.args, "kwargs": a.kwargs}), leaves({"args": b.args, "kwargs": b.kwargs})
        if left.keys() != right.keys():
            raise UnsupportedPolicyError(
                f"{a.module} gets other arguments for 3 takes than for 2: {sorted(left.keys() ^ right.keys())[:4]}"
            )
        for path, leaf in left.items():
            if isinstance(leaf, torch.Tensor):
                layout = layout_between(f"{a.module} input {path}", leaf, right[path])
                if layout is not None:
                    layouts[f"{number}:{path}"] = layout
        output = layout_between(f"{a.module} output", a.output, b.output)
        if output is None or output.axis != 0:
            raise UnsupportedPolicyError(f"{a.module} output {list(a.output.shape)}: the batch is not its first axis")
        outputs.append(output)
    return layouts, outputs


def find_rule(steps: list[RawStep], outputs: list[Layout], nominal: float) -> tuple[str, str, float | None, float]:
    """The guidance rule that reproduces the scheduler's input: (rule, cut, scale, largest relative error).
    A scale of None means the pipeline's own, step by step.

    `nominal`: the configured scale; the pipeline's own `guidance_scale` at each step is tried first, then the scale
    that least squares gives. Raises UnsupportedPolicyError when none fits or the branches cannot be told apart.
    """
    step_branches = []
    cut = None
    for step in steps:
        raw = [
            b
            for call, layout in zip(step.calls, outputs, strict=True)
            for b in (call.output.chunk(layout.copies) if layout.order == "tile" else [call.output])
        ]
        cut = cut_for(raw[0].shape, step.sample.shape)
        if cut is None:
            raise UnsupportedPolicyError(
                f"the denoiser gives {list(raw[0].shape)} where the scheduler works on {list(step.sample.shape)}"
            )
        step_branches.append([CUTS[cut](b, step.sample.shape) for b in raw])
    number = len(step_branches[0])
    if number > 1 and all(torch.equal(b[0], b[1]) for b in step_branches):
        raise UnsupportedPolicyError(
            "conditional and unconditional outputs are equal, so any guidance rule fits: are the weights zero, "
            "or the prompt and the negative prompt the same?"
        )

    def error(name: str, scale: float | None) -> float:
        worst = 0.0
        for step, branches in zip(steps, step_branches, strict=True):
            value = RULES[name][1](branches, step.guidance_scale if scale is None else scale)
            peak = float(step.model_output.abs().max()) or 1.0
            worst = max(worst, float((value - step.model_output).abs().max()) / peak)
        return worst if worst == worst else float("inf")  # NaN never fits

    candidates: list[tuple[float, str, float | None]] = []
    for name, (branches, _) in RULES.items():
        if branches != number:
            continue
        candidates.append((error(name, None), name, None))
        candidates.append((error(name, nominal), name, nominal))
        solved = solve_scale(name, step_branches[0], steps[0].model_output) if name in LINEAR else None
        if solved is not None:
            candidates.append((error(name, round(solved, 4)), name, round(solved, 4)))
    if not candidates:
        raise UnsupportedPolicyError(f"{number} denoiser outputs per step: no guidance rule for that many is known")
    best, name, scale = min(candidates, key=lambda candidate: candidate[0])
    if best > RULE_TOLERANCE:
        tried = ", ".join(f"{n} ({e:.1e})" for e, n, _ in sorted(candidates, key=lambda c: c[0])[:4])
        raise UnsupportedPolicyError(
            f"no guidance rule reproduces what the scheduler receives (allowed {RULE_TOLERANCE:.0e}); closest: {tried}"
        )
    return name, cut, scale, best


def find_spec(
    pipeline: str, prediction: str, two: Recording, three: Recording, scale: float
) -> tuple[PolicySpec, dict]:
    """The policy spec from recordings at batch 2 and 3, and a plain report of what was measured."""
    for recording in (two, three):
        if not recording.continuous:
            raise UnsupportedPolicyError(
                f"{pipeline} changes the sample between scheduler steps (re-blending or re-injected frames); "
                "the policy does not own those values"
            )
    layouts, outputs = find_layouts(two.steps[0], three.steps[0])
    for step in two.steps[1:]:
        if [c.module for c in step.calls] != [c.module for c in two.steps[0].calls] and len(step.calls) != len(outputs):
            raise UnsupportedPolicyError(
                f"{pipeline} makes {len(step.calls)} denoiser calls at step {step.index} and {len(outputs)} at step 0"
            )
    rule, cut, found_scale, error = find_rule(two.steps, outputs, scale)
    spec = PolicySpec(
        pipeline=pipeline,
        prediction=prediction,
        rule=rule,
        scale=found_scale,
        cut=cut,
        layouts=layouts,
        outputs=outputs,
    )
    report = {
        "pipeline": pipeline,
        "prediction": prediction,
        "guidance_rule": rule,
        "guidance_scale": two.steps[0].guidance_scale if found_scale is None else found_scale,
        "guidance_error": error,
        "output_cut": cut,
        "denoiser_calls_per_step": len(outputs),
        "denoisers": sorted({call.module for step in two.steps for call in step.calls}),
        "takes_axis": {path: [v.axis, v.copies, v.order] for path, v in layouts.items()},
    }
    return spec, report
