"""UnifiedReward and UnifiedReward-Think (Wang et al., arXiv 2503.05236 and 2505.03318), on vLLM or behind an endpoint.

The models get the prompts they were trained with, as rubrics (`rubrics/unified_reward_*.yaml`); which one
depends on the version and on whether pictures or clips are judged. As a judge of pairs the scorer goes into
`tournament`; Think only compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.core.errors import ConfigError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import register
from pipeline.rewards.models.chat_backend import check_backend
from pipeline.rewards.models.pairwise import PairwiseJudge
from pipeline.rewards.models.pretrained import check_choice
from pipeline.rewards.models.rubric import load_rubric
from pipeline.rewards.scorers.vlm_judge import VlmJudge

VERSIONS = ("1", "2", "think")


def rubric_name(version: str, pair: bool, clip: bool) -> str:
    return f"unified_reward_{version}{'_pair' if pair else ''}{'_video' if clip else ''}"


@register("unified_reward")
class UnifiedReward(VlmJudge, PairwiseJudge):
    """UnifiedReward on vLLM or behind an endpoint: its ratings as 0 to 1; also a judge for `tournament`."""

    pairs = True
    tested_with = "a stand-in server"

    def __init__(
        self,
        model: str = "UnifiedReward",
        version: str = "2",
        base_url: str | None = None,
        engine: dict[str, Any] | None = None,
        api_key_env: str | None = None,
        frames: int = 8,
        max_side: int = 512,
        attempts: int = 3,
        parallel: int = 8,
        timeout_s: float = 120.0,
        retries: int = 2,
    ) -> None:
        """`version`: 1, 2 or think, the family of the model. The others as of `vlm_judge`."""
        self.version = check_choice("version", str(version), VERSIONS)
        super().__init__(
            model,
            rubric_name(self.version, pair=self.version == "think", clip=False),
            base_url=base_url,
            engine=engine,
            api_key_env=api_key_env,
            frames=frames,
            max_side=max_side,
            attempts=attempts,
            parallel=parallel,
            timeout_s=timeout_s,
            retries=retries,
        )
        self.relative = False

    @classmethod
    def check_args(cls, args: dict) -> None:
        check_choice("version", str(args.get("version", "2")), VERSIONS)
        check_backend(args)
        if args.get("base_url") is None and "model" not in args:
            raise ConfigError("base_url: set it to where UnifiedReward is served, or `model` to its weights")

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray | dict[str, np.ndarray]:
        if self.version == "think":
            raise ConfigError(
                "UnifiedReward-Think only compares; use scorer: tournament, args: {judge: unified_reward, args: …}"
            )
        self.rubric = load_rubric(rubric_name(self.version, pair=False, clip=media.frames.shape[1] > 1))
        return super().score(media, prompts)

    def compare(self, first: Media, second: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        self.rubric = load_rubric(rubric_name(self.version, pair=True, clip=first.frames.shape[1] > 1))
        pairs = zip(self._pictures(first), self._pictures(second), prompts, strict=True)
        return np.asarray(self._better(list(pairs), first.fps))
