"""A reward server: one scorer. It is handed media only, never latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.ray_options import from_bytes
from actors.role_actor import RoleActor
from pipeline.core.errors import RewardError, RewardUnavailable
from pipeline.core.types import Media, PromptItem, RewardScores


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What is to be scored of one group, but for its media."""

    group: int
    prompts: tuple[PromptItem, ...]  # [K]
    seed: int | None  # frame picks of training, the same for all takes of the group; None: centre picks (evaluation)


class RewardServer(RoleActor):
    role = "reward"
    hands_back = True

    def start(self, reward: str, prompts: Sequence[PromptItem]) -> dict[str, Any]:
        """Builds the scorer of `rewards.<reward>` and warms it up on a grey take of one of these prompts.

        Raises `RushesError`, also when what the scorer asks cannot be reached. A scorer that refuses the grey take
        starts all the same.
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

    def score(self, order: bytes, *media: Media) -> list[RewardScores | RewardError]:
        """`order`: list[Asked], packed. One outcome per group, whose media come one by one; see
        `pipeline.rewards.batching`.

        Raises `RuntimeError` when nothing can be scored any more, not even what could be at the start: this server is
        ill, and another one shall be started.
        """
        from pipeline.rewards.batching import Takes, score_groups

        asked: list[ScoreRequest] = from_bytes(order)
        first = asked[0].group
        names = f"group {first}" if len(asked) == 1 else f"groups {', '.join(str(one.group) for one in asked)}"
        with self.doing(f"scoring {names}", first):
            groups = [Takes(shown, one.prompts, one.seed) for one, shown in zip(asked, media, strict=True)]
            outcomes = score_groups(self.runner, groups)
            for one, outcome in zip(asked, outcomes, strict=True):
                if isinstance(outcome, RewardError):
                    self.log.error("scoring failed: %s", outcome, exc_info=outcome, extra={"group": one.group})
            failed = [o for o in outcomes if isinstance(o, RewardError) and not isinstance(o, RewardUnavailable)]
            self.metrics.takes(sum(len(one.prompts) for one in asked))
            if self.warm and len(failed) == len(outcomes):
                self._check_health(failed[0])
        return outcomes

    def _check_health(self, failure: RewardError) -> None:
        try:
            self.runner.run(*self.sample, None)
        except RewardUnavailable:
            return
        except RewardError:
            raise RuntimeError(f"no longer scores what it scored at its start; {failure}") from failure

    def _sample(self, prompt: PromptItem) -> tuple[Media, list[PromptItem]]:
        """Grey takes of the configured size, without their memory: one, or two where takes are compared."""
        generator, takes = self.cfg.generator, 2 if self.runner.scorer.relative else 1
        shape = (takes, generator.num_frames, generator.height, generator.width, 3)
        grey = np.broadcast_to(np.asarray(128, np.uint8), shape)
        return Media(frames=grey, fps=generator.fps), [prompt] * takes
