"""Policy losses by name. A new one: a function of `Terms` in its own file, one line here, one test."""

from pipeline.rl.objectives.awm import matching
from pipeline.rl.objectives.grpo import Terms, flow_dppo, grpo, grpo_guard

OBJECTIVES = {"grpo": grpo, "grpo_guard": grpo_guard, "flow_dppo": flow_dppo}

__all__ = ["OBJECTIVES", "Terms", "matching"]
