"""A reward server: one scorer in an actor. It is given media, never latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.group_run import ScoreRequest
from actors.ray_options import from_bytes
from actors.role_actor import RoleActor
from pipeline.core.errors import RewardError, RewardUnavailable
from pipeline.core.types import Media, PromptItem, RewardScores


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

        `request`: `to_bytes` of list[ScoreRequest]. `media`: of each group, as an argument of its own, so that Ray
        fetches it. Raises `RuntimeError` when no group could be scored and the health probe fails too; the pool then
        replaces this server.
        """
        from pipeline.rewards.batching import Takes, score_groups

        requests: list[ScoreRequest] = from_bytes(request)
        first = requests[0].group
        names = f"group{'s' * (len(requests) > 1)} {', '.join(str(each.group) for each in requests)}"
        with self.doing(f"scoring {names}", first):
            groups = [Takes(frames, each.prompts, each.seed) for each, frames in zip(requests, media, strict=True)]
            outcomes = score_groups(self.runner, groups)
            for each, outcome in zip(requests, outcomes, strict=True):
                if isinstance(outcome, RewardError):
                    self.log.error("scoring failed: %s", outcome, exc_info=outcome, extra={"group": each.group})
            failed = [o for o in outcomes if isinstance(o, RewardError) and not isinstance(o, RewardUnavailable)]
            self.metrics.takes(sum(len(each.prompts) for each in requests))
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
