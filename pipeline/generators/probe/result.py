"""What a probe finds out about a pipeline: enough to call it, to fit its guidance at every step, and to replay it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import PromptItem, StepGuidance
from pipeline.generators.policy_pipeline import CallPlan
from pipeline.generators.probe.fit import check_guidance, fit_guidance
from pipeline.generators.record.recording import RawStep
from pipeline.generators.spec import PolicySpec, call_keys
from pipeline.rl.noise_grid import NoiseGrid


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """The result of `probe`."""

    spec: PolicySpec
    plan: CallPlan  # how the pipeline is called
    scales: tuple[float, ...]  # guidance scales that the pipeline call itself names
    prompts: tuple[PromptItem, ...]  # that were probed with
    grid: NoiseGrid | None = None  # noise levels of a run's sampler steps; None: not read yet
    alike_outputs: bool = False  # a step's own outputs are too similar to tell its guidance
    # (sampler steps, index of a step) -> its guidance, where outputs are alike; see probe.guidance_for
    fixed_guidance: dict[tuple[int, int], StepGuidance] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)  # plain data, for people

    def fit_step(self, step: RawStep) -> None:
        """Sets the step's guidance, having checked that replay will give what the scheduler received.

        Raises UnsupportedPolicyError where it will not.
        """
        spec = self.spec
        if not step.calls or not all(key in spec.outputs for key in call_keys(len(step.calls))):
            raise UnsupportedPolicyError(
                f"{spec.pipeline} makes {len(step.calls)} denoiser calls at step {step.index}, which the probe did not "
                "see"
            )
        branches = spec.branches(step.outputs, step.sample.shape)
        rule = spec.rules.get(len(branches))
        if rule is None:
            raise UnsupportedPolicyError(
                f"{spec.pipeline} has {len(branches)} guidance branches at step {step.index}, which the probe did not "
                "see"
            )
        fixed = self.fixed_guidance.get((step.num_steps, step.index))
        if fixed is not None:
            check_guidance(branches, step, fixed, spec.sign)
            step.guidance = fixed
        else:
            step.guidance = fit_guidance(branches, step, rule, spec.sign, self.scales)
