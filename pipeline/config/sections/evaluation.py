"""The config's `evaluation` section: held-out takes, and what happens when they look suspicious."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.sections.base import Count, Natural, Positive, Section


class EvaluationConfig(Section):
    """Evaluation on held-out prompts, always on the same seeds."""

    every: Natural = Field(0, description="Evaluate every N steps as well as before and after (0: only those).")
    prompts: Natural = Field(64, description="Held-out prompts evaluated (0: all).")
    takes_per_prompt: Count = Field(1, description="Takes per held-out prompt, on fixed seeds.")
    steps: Count = Field(20, description="ODE sampler steps.")
    batch: Count = Field(16, description="Takes per denoiser call in evaluation.")
    keep_best: str | None = Field(
        None,
        description="A reward: the checkpoint with its highest held-out mean is kept besides `checkpoint.keep`, and "
        "exported at the end instead of the last one.",
    )
    on_suspect: Literal["warn", "stop", "rollback"] = Field(
        "warn",
        description="What an evaluation with the verdict `suspect` does: warn, end the run and export, or end it and "
        "export the best checkpoint by `keep_best` (default: by the only reward of weight 0).",
    )
    guards: dict[str, Positive | None] = Field(
        default_factory=dict,
        description="Tolerances of guards (docs/trust.md) other than their defaults, by name; null: switched off.",
    )
