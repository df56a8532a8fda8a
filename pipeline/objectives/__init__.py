"""Policy losses by name. A new one: a function of `Terms` in its own file, one line here, one test."""

from pipeline.objectives.grpo import Terms, flow_dppo, grpo, grpo_guard
from pipeline.objectives.matching import matching

OBJECTIVES = {"grpo": grpo, "grpo_guard": grpo_guard, "flow_dppo": flow_dppo}

__all__ = ["OBJECTIVES", "Terms", "matching"]
