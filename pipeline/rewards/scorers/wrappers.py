"""Scorers that wrap another scorer: its score thresholded or rescaled. Applied to a take's final score, so on videos
after the segments have been combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.config.messages import show
from pipeline.core.errors import ConfigError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.pretrained import check_number
from pipeline.rewards.registry import check_options, create_scorer, gradient_note

if TYPE_CHECKING:
    import torch


class _Wrapper(Scorer):
    reads: Literal["frame", "video"] = "frame"  # the wrapped scorer's, once it is built

    def __init__(self, scorer: str, args: dict[str, Any] | None) -> None:
        self.inner = create_scorer(scorer, args or {})
        self.reads, self.needs_prompt = self.inner.reads, self.inner.needs_prompt
        self.relative = self.inner.relative

    @classmethod
    def check_args(cls, args: dict) -> None:
        scorer, inner_args = args["scorer"], args.get("args")
        if not isinstance(scorer, str) or not scorer:
            raise ConfigError(f"scorer: found {show(scorer)}; expected a scorer's name or file.py:function")
        if inner_args is not None and not isinstance(inner_args, dict):
            raise ConfigError(f"args: found {show(inner_args)}; expected the options of {scorer}")
        check_options(scorer, inner_args or {}, key="args.args")

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray | dict[str, np.ndarray]:
        return self.inner.score(media, prompts)


@register("binary")
class Binary(_Wrapper):
    """1 where another scorer's score is above `threshold`, else 0 (the sparse feedback of DanceGRPO).

    Many groups end up all 0 or all 1 and teach nothing: a threshold near the policy's median score wastes least.
    """

    gradient_note = "a threshold has no slope; use scaled"

    def __init__(self, scorer: str, threshold: float, args: dict[str, Any] | None = None) -> None:
        """`scorer` and `args`: the scorer to threshold and its options."""
        self.threshold = check_number("threshold", threshold)
        super().__init__(scorer, args)

    def finish(self, values: np.ndarray) -> np.ndarray:
        return (self.inner.finish(values) > self.threshold).astype(np.float32)


@register("scaled")
class Scaled(_Wrapper):
    """(another scorer's score - `shift`) / `scale`, kept within `low` and `high`: brings rewards to one scale."""

    def __init__(
        self,
        scorer: str,
        shift: float = 0.0,
        scale: float = 1.0,
        low: float | None = None,
        high: float | None = None,
        args: dict[str, Any] | None = None,
    ) -> None:
        """`low`, `high`: bounds after scaling; unset: none."""
        self.shift, self.scale = check_number("shift", shift), check_number("scale", scale)
        if self.scale == 0:
            raise ConfigError("scale: found 0; expected another number")
        self.low = None if low is None else check_number("low", low)
        self.high = None if high is None else check_number("high", high)
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ConfigError(f"low: found {self.low:g}, which is not below high = {self.high:g}")
        super().__init__(scorer, args)

    @classmethod
    def why_no_gradient(cls, args: dict) -> str:
        return gradient_note(args["scorer"], args.get("args") or {})

    def looks_at(self, frames: int, fps: float) -> Sequence[int]:
        return self.inner.looks_at(frames, fps)

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        return self.inner.score_pixels(pixels, prompts)

    def finish_tensor(self, values: torch.Tensor) -> torch.Tensor:
        scaled = (self.inner.finish_tensor(values) - self.shift) / self.scale
        return scaled if self.low is None and self.high is None else scaled.clamp(self.low, self.high)

    def finish(self, values: np.ndarray) -> np.ndarray:
        scaled = (self.inner.finish(values) - self.shift) / self.scale
        return np.clip(scaled, self.low, self.high).astype(np.float32)
