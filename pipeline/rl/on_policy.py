"""The on-policy invariant: before the first update of a step, the learner's replay equals the rollout.

A replay that differs means that rollout and learner disagree about the policy, so the gradient would be that of
another policy than the one that sampled.
"""

from __future__ import annotations

from collections.abc import Collection

from pipeline.config.schema import Config
from pipeline.core.errors import RunFailed

ON_POLICY_TOLERANCE = 1e-5  # in float32


def check_on_policy(cfg: Config, step: int, replay_error: float, devices: Collection[str]) -> None:
    """Raises `RunFailed` where learner and rollouts hold the same float32 weights and the replay differs.

    `replay_error`: largest |log-ratio| before the first update, or largest difference of a replayed sample where the
    objective has no log-probs (its `replay_metric`).
    `devices`: of the learner and the rollout workers.
    """
    exact = cfg.generator.dtype == "float32" or (cfg.generator.dtype == "auto" and set(devices) == {"cpu"})
    if not exact or cfg.learner.autocast != "none" or cfg.rollout.merge_lora:
        return  # lower precision: equal up to rounding only
    if not replay_error < ON_POLICY_TOLERANCE:
        raise RunFailed(
            f"step {step}: before the update the learner's replay differs from the rollouts by up to "
            f"{replay_error:.2e} (allowed {ON_POLICY_TOLERANCE:.0e} in float32), so it does not train the policy that "
            "sampled; all workers need the same library versions, and the generator must not keep state between calls"
        )
