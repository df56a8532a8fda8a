"""UnifiedReward and UnifiedReward-Think (Wang et al., arXiv 2503.05236 and 2505.03318), served by vLLM or the like.

The models are asked in the words they were trained on, which are rubrics (`rubrics/unified_reward_*.yaml`); which one
depends on the version and on whether pictures or clips are judged. As a judge of pairs the scorer goes into
`tournament`; Think only compares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.errors import ConfigError
from pipeline.rewards.base import register
from pipeline.rewards.pretrained import check_choice
from pipeline.rewards.rubric import load_rubric
from pipeline.rewards.tournament import PairwiseJudge
from pipeline.rewards.vlm_judge import VlmJudge
from pipeline.types import Media, PromptItem

VERSIONS = ("1", "2", "think")


def rubric_name(version: str, pair: bool, clip: bool) -> str:
    return f"unified_reward_{version}{'_pair' if pair else ''}{'_video' if clip else ''}"


@register("unified_reward")
class UnifiedReward(VlmJudge, PairwiseJudge):
    """UnifiedReward behind an OpenAI-compatible endpoint: its ratings as 0 to 1; also a judge for `tournament`."""

    def __init__(
        self,
        base_url: str,
        model: str = "UnifiedReward",
        version: str = "2",
        api_key_env: str | None = None,
        frames: int = 8,
        max_side: int = 512,
        attempts: int = 3,
        parallel: int = 8,
        timeout_s: float = 120.0,
        retries: int = 2,
    ) -> None:
        """`version`: 1, 2 or think, the family of the served model. The others as of `vlm_judge`."""
        self.version = check_choice("version", str(version), VERSIONS)
        super().__init__(
            base_url,
            model,
            rubric_name(self.version, pair=self.version == "think", clip=False),
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

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray | dict[str, np.ndarray]:
        if self.version == "think":
            raise ConfigError(
                "UnifiedReward-Think only compares; use scorer: tournament, args: {judge: unified_reward, args: …}"
            )
        self.rubric = load_rubric(rubric_name(self.version, pair=False, clip=media.frames.shape[1] > 1))
        return super().score(media, prompts)

    def compare(self, first: Media, second: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        self.rubric = load_rubric(rubric_name(self.version, pair=True, clip=first.frames.shape[1] > 1))
        one, other = (self._each(self._pictures, list(media.frames)) for media in (first, second))
        return np.asarray(
            self._each(lambda i: self._match(one[i], other[i], prompts[i], first.fps), list(range(len(prompts))))
        )
