"""A reward server: one scorer in an actor. It is given media, never latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.ray_options import from_bytes
from actors.role_actor import RoleActor
from pipeline.core.errors import RewardError, RewardUnavailable
from pipeline.core.types import GroupWork, Media, PromptItem, RewardScores


class RewardServer(RoleActor):
    role = "reward"
    drains_on_sigterm = True

    def start(self, reward: str, prompts: Sequence[PromptItem]) -> dict[str, Any]:
        """Builds the scorer of `rewards.<reward>` and warms it up on a grey take of the first prompt.

        Raises `RushesError`, also when a service that the scorer calls cannot be reached. A scorer that refuses the
        grey take starts all the same.
        """
        from pipeline.rewards.runner import build_reward

        with self.doing("starting"):
            self.runner = build_reward(reward, self.cfg.rewards[reward])
            self.sample = self._sample(prompts[0])
            self.warm = False
            try:
                self.runner.run(*self.sample, None)
                self.warm = True
            except RewardUnavailable:
                raise
            except RewardError as error:
                self.log.info("not warmed up: %s", error)
        return self.info()

    def score(self, request: bytes, *media: Media) -> list[RewardScores | RewardError]:
        """Scores groups together: one outcome per group (`pipeline.rewards.batching`).

        `request`: `to_bytes` of list[GroupWork]. `media`: of each group, as an argument of its own, so that Ray
        fetches it. Raises `RuntimeError` when no group could be scored and the health probe fails too; the pool then
        replaces this server.
        """
        from pipeline.rewards.batching import Takes, score_groups

        works: list[GroupWork] = from_bytes(request)
        first = works[0].group
        names = f"group{'s' * (len(works) > 1)} {', '.join(str(work.group) for work in works)}"
        with self.doing(f"scoring {names}", first):
            groups = [Takes(frames, work.prompts, work.scoring_seed) for work, frames in zip(works, media, strict=True)]
            outcomes = score_groups(self.runner, groups)
            for work, outcome in zip(works, outcomes, strict=True):
                if isinstance(outcome, RewardError):
                    self.log.error("scoring failed: %s", outcome, exc_info=outcome, extra={"group": work.group})
            failed = [o for o in outcomes if isinstance(o, RewardError) and not isinstance(o, RewardUnavailable)]
            self.metrics.takes(sum(work.takes for work in works))
            if self.warm and len(failed) == len(outcomes):
                self._check_health(failed[0])
        return outcomes

    def _check_health(self, failure: RewardError) -> None:
        """Scores the grey take again. Raises `RuntimeError` when that fails."""
        try:
            self.runner.run(*self.sample, None)
        except RewardUnavailable:
            return
        except RewardError:
            raise RuntimeError(f"no longer scores what it scored at its start; {failure}") from failure

    def _sample(self, prompt: PromptItem) -> tuple[Media, list[PromptItem]]:
        """A grey take of the configured size, or two where takes are compared; they share one value in memory."""
        generator, takes = self.cfg.generator, 2 if self.runner.scorer.relative else 1
        shape = (takes, generator.num_frames, generator.height, generator.width, 3)
        grey = np.broadcast_to(np.asarray(128, np.uint8), shape)
        return Media(frames=grey, fps=generator.fps), [prompt] * takes
