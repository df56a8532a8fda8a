"""The config's `rewards` section: which scorers judge a take, and how each becomes one number per take."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.resources import TenthCpu, WorkerCount, WorkerRange
from pipeline.config.sections.base import Count, Natural, NonNegative, Section, Share
from pipeline.core.reading import shown

RUNTIME_ENV_KEYS = ("py_executable", "pip", "uv", "conda", "image_uri", "env_vars")


class SegmentsConfig(Section):
    """How a frame scorer is applied to a video (`pipeline.rewards.segments`)."""

    count: Count = Field(4, description="Segments that a clip is split into (InstructVideo: 4).")
    frames: Count = Field(1, description="Frames scored per segment.")
    attenuation: NonNegative = Field(
        1.0,
        description="Lambda of the frame weights exp(-lambda * 16/F * |frame - F/2|); 0: all frames weigh the same.",
    )
    aggregate: Literal["mean", "min"] | Share = Field(
        "mean",
        description="How segment scores become a take's score: their weighted mean, the worst segment, or, for a "
        "number p, the weighted mean of the best share p of the segments.",
    )
    normalize: bool = Field(True, description="Divide by the sum of the weights, which keeps the scorer's scale.")


class RewardConfig(Section):
    """One reward: its scorer, its weight, and its servers."""

    scorer: str = Field(description="A registered scorer (`rushes score --list`) or `file.py:function`.")
    weight: float = Field(1.0, description="Weight in the sum of rewards or of advantages; 0: only logged.")
    gradient: bool = Field(
        False,
        description="Compute it in the learner, with gradients to the pictures, for an objective that learns through "
        "them; its servers then only evaluate.",
    )
    normalize: Literal["none", "step", "running"] = Field(
        "none",
        description="Before rewards are combined: (score - mean) / std over the step's takes, or over all takes so far "
        "(kept in checkpoints).",
    )
    clip: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[lowest, highest] value of the score, after normalisation."
    )
    score_repeats: Count = Field(
        1,
        description="Scorings per training take, each of slightly shifted frames. Their variance u, relative to the "
        "group's, multiplies the take's advantage by exp(-u).",
    )
    args: dict[str, Any] = Field(default_factory=dict, description="Options of the scorer.")
    segments: SegmentsConfig = Field(
        default_factory=SegmentsConfig, description="How a frame scorer is applied to videos."
    )
    workers: WorkerCount = Field(WorkerRange(1, 1), description="Reward servers for this reward: a number, or a range.")
    resources: TenthCpu = Field(
        {"CPU": 0.1},
        description="Ray resources reserved per server: CPU, GPU (may be a fraction), memory, custom ones.",
    )
    batch_items: Natural = Field(
        0,
        description="Most takes in one call of the scorer, from several waiting groups; 0: one group per call, so that "
        "scores do not depend on timing, not even in their last bits.",
    )
    threads: Count = Field(1, description="Compute threads per server.")
    runtime_env: dict[str, Any] = Field(
        default_factory=dict,
        description="Ray runtime environment of the servers, for a scorer whose packages conflict with the others': "
        "py_executable (a Python of the same version, with the same Ray), pip, uv, conda, image_uri, env_vars.",
    )

    @field_validator("runtime_env")
    @classmethod
    def _known_runtime_env(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key not in RUNTIME_ENV_KEYS:
                raise ValueError(f"found the key {key!r}; allowed: {', '.join(RUNTIME_ENV_KEYS)}")
        variables = value.get("env_vars", {})
        if not isinstance(variables, dict) or not all(isinstance(v, str) for kv in variables.items() for v in kv):
            raise ValueError(f"env_vars: found {shown(variables)}; expected names and texts (quote numbers)")
        return value

    @model_validator(mode="after")
    def _clip_in_order(self) -> RewardConfig:
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip: found {self.clip}; the first number must be below the second")
        return self
