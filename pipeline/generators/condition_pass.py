"""The pipeline's own call without its denoisers: the grid of noise levels, and the conditions at any of them.

What a denoiser is given besides the sample (text, pictures, sizes, timesteps) is made by the pipeline; none of it needs
denoising. A labelled pair or a data clip becomes an ordinary trajectory part this way; the learner puts samples in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.core.tensors import PackedTensor
from pipeline.core.types import PromptItem, SamplingSpec, TrajectoryPart
from pipeline.generators.policy_pipeline import PolicyPipeline
from pipeline.generators.probe.result import ProbeResult
from pipeline.generators.record.packing import pack_conditions
from pipeline.generators.record.recording import Recording, RecordOptions
from pipeline.generators.replay.text_inputs import to_call_inputs
from pipeline.rl.samplers import NoiseLevels


class ConditionPass:
    """See the module docstring. Not thread-safe, as the pipeline is not."""

    def __init__(self, pipeline: PolicyPipeline, probed: ProbeResult) -> None:
        """`probed`: with the guidance of the grids that are asked for (`probe.guidance_for`)."""
        self.pipeline, self.probed = pipeline, probed

    def grid(self, sampling: SamplingSpec) -> tuple[NoiseLevels, ...]:
        """The noise levels of each of the sampler's steps."""
        prompts = self.probed.prompts[:1]
        options = RecordOptions(stop_early=True)  # at the first step, when its scheduler has been set
        return self.pipeline.sample(self.probed.plan, prompts, [0], None, sampling, options).recording.levels

    def record(
        self, prompts: Sequence[PromptItem], seeds: Sequence[int], sampling: SamplingSpec, steps: Sequence[int]
    ) -> Recording:
        """The denoiser inputs at these sampler steps, with their guidance. The samples among them, and all that is
        computed from them, are made up.

        `seeds`: of what a pipeline draws besides (noise on a condition). Raises UnsupportedPolicyError.
        """
        source = torch.Generator().manual_seed(0)

        def random_output(_step: int, _name: str, output: torch.Tensor) -> torch.Tensor:
            """Numbers that differ between the branches of guidance, so that its rule can be checked."""
            return torch.randn(output.shape, generator=source).to(output)

        options = RecordOptions(
            keep_steps=frozenset(steps), on_step=self.probed.fit_step, replace_output=random_output, stop_early=True
        )
        sampled = self.pipeline.sample(
            self.probed.plan, prompts, seeds, None, sampling, options, denoise_from=sampling.num_steps
        )
        return sampled.recording

    def part(
        self,
        prompts: Sequence[PromptItem],
        seeds: Sequence[int],
        sampling: SamplingSpec,
        clean: PackedTensor | None,
        start: int = 0,
    ) -> TrajectoryPart:
        """The conditions at `sampling.trained_steps`, as the part of a trajectory that begins at take `start`.

        `clean`: the takes' finished latents [K, ...], of encoded data say; None: the learner has none.
        """
        recording = self.record(prompts, seeds, sampling, sampling.trained_steps)
        inputs = None
        if self.pipeline.text is not None:
            inputs = to_call_inputs(prompts, seeds, self.probed.plan.mode, self.probed.plan.placeholders)
        return pack_conditions(recording, start, start + len(prompts), clean, inputs)
