"""A reward server: one scorer. It is handed media only, never latents."""

from __future__ import annotations

from typing import Any

from actors.common import RoleActor
from pipeline.types import Media, PromptItem, RewardScores


class RewardServer(RoleActor):
    role = "reward"
    hands_back = True

    def start(self, reward: str) -> dict[str, Any]:
        """Builds the scorer of `rewards.<reward>`. Raises `RushesError`."""
        from pipeline.rewards.loader import build_scorer

        with self.doing("starting"):
            self.runner = build_scorer(reward, self.cfg.rewards[reward])
        return self.info()

    def score(self, media: Media, prompts: tuple[PromptItem, ...], seed: int | None, group: int) -> RewardScores:
        """`seed`: frame picks of training, the same for all takes of the group; None: centre picks (evaluation)."""
        with self.doing(f"scoring group {group}", group):
            scores = self.runner.run(media, prompts, seed)
            self.metrics.takes(len(prompts))
        return scores
