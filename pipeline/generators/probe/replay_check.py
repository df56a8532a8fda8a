"""Checks that replaying a recorded rollout gives its log-probs."""

from __future__ import annotations

import torch

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import SamplingSpec
from pipeline.generators.load.pipeline import replayed_modules
from pipeline.generators.policy_pipeline import PolicyPipeline
from pipeline.generators.record.attention import reset_processors
from pipeline.generators.record.packing import pack_recording
from pipeline.generators.record.recording import Recording
from pipeline.generators.replay.replayer import Replayer
from pipeline.generators.spec import PolicySpec
from pipeline.rl.samplers import log_prob

RATIO_TOLERANCE = 1e-5  # |log-ratio| of an on-policy replay in float32
_LOW_PRECISION_RATIO_TOLERANCE = 1e-2


@torch.no_grad()
def check_replay(
    pipeline: PolicyPipeline, spec: PolicySpec, recording: Recording, sampling: SamplingSpec
) -> dict[str, float]:
    """Replays steps out of order, whole and take by take. Returns the largest |log-ratio| of each.

    Raises UnsupportedPolicyError where it is more than rounding.
    """
    takes = recording.steps[0].sample.shape[0]
    part = pack_recording(recording, 0, takes, keep_mean=False)
    replayer = Replayer(part, spec, replayed_modules(pipeline.pipe), pipeline.device)
    worst = {"replay_whole": 0.0, "replay_single": 0.0}
    singles = [slice(i, i + 1) for i in range(takes)]
    for j in (1, 0, 1):
        for key, slices in (("replay_whole", [slice(0, takes)]), ("replay_single", singles)):
            for entries in slices:
                sample, next_sample, old = replayer.step_tensors(j, entries)
                out = replayer.model_output(j, entries, sample)
                gaussian = replayer.move(j, entries, sample, out, sampling)
                ratio = float((log_prob(next_sample, gaussian) - old).abs().max())
                worst[key] = max(worst[key], ratio)
    reset_processors(pipeline.denoisers.values())
    parameters = [p for module in pipeline.denoisers.values() for p in module.parameters()]
    exact = all(parameter.dtype == torch.float32 for parameter in parameters)
    bound = RATIO_TOLERANCE if exact else _LOW_PRECISION_RATIO_TOLERANCE
    # Single takes run through other kernels; over few latent values their rounding shows more.
    if not (worst["replay_whole"] < bound and worst["replay_single"] < 10 * bound):
        raise UnsupportedPolicyError(
            f"{pipeline.name}: replaying a rollout gives log-ratios of up to {max(worst.values()):.1e} "
            f"(allowed {bound:.0e}); does it keep state between calls, or change its model while sampling "
            "(caching, a stateful guider, attention processors of its own, dropout)?"
        )
    return worst
