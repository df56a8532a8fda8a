"""Takes that a search finds, for `rushes generate --search` and `rushes evaluate --search`.

Searches run in chunks that share pipeline calls. Which takes make a chunk depends on the config alone, so that a
resumed command, or another number of workers, finds the same takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.schema import Config
from pipeline.core.types import Media, PromptItem, RewardScores
from pipeline.rewards.runner import RewardRunner, build_reward
from pipeline.rl.group_plan import sample_works
from pipeline.search.base import Found, Search, Task, steering_weights

if TYPE_CHECKING:
    from pipeline.generators.policy import Policy
    from pipeline.search.run import Progress


@dataclass(frozen=True, slots=True)
class Wanted:
    """A take that is searched for."""

    prompt: PromptItem
    seed: int  # of the plain take


@dataclass(frozen=True, slots=True)
class SearchedTakes:
    """A chunk of found takes."""

    wanted: list[Wanted]
    tasks: list[Task]  # with their traces
    found: list[Found]
    media: Media
    scores: dict[str, RewardScores]  # of every reward, also those that do not steer


def read_search_option(cfg: Config, text: str, passes: int | None = None) -> Search:
    """The search of a `--search` option, and whether the config's rewards can steer it. Raises `ConfigError`."""
    from pipeline.rewards.gradients import check_gradient
    from pipeline.search.load import load_search
    from pipeline.tools import preflight

    search = load_search(text, passes)
    steering = steering_weights(cfg.reward_weights)
    preflight.check_rewards(cfg)
    for name in steering if search.gradients else ():
        check_gradient(name, cfg.rewards[name])
    return search


def rewards_of(cfg: Config) -> dict[str, RewardRunner]:
    """Every reward of the config, loaded."""
    return {name: build_reward(name, reward, cfg.faults.call_timeout_s) for name, reward in cfg.rewards.items()}


def takes_wanted(cfg: Config, prompts: Sequence[PromptItem], takes: int, seed: int) -> list[Wanted]:
    """The takes that `rushes generate` would draw, in its order."""
    works = sample_works(cfg, prompts, takes, seed)
    return [Wanted(*pair) for work in works for pair in zip(work.prompts, work.seeds, strict=True)]


def chunks(cfg: Config, search: Search, wanted: Sequence[Wanted]) -> list[list[Wanted]]:
    """Takes that are searched for together: about as many as fill pipeline calls of `evaluation.batch`."""
    size = max(1, cfg.evaluation.batch // search.particles)
    return [list(wanted[start : start + size]) for start in range(0, len(wanted), size)]


def probe_for(policy: Policy, search: Search, prompts: Sequence[PromptItem]) -> None:
    """Probes the pipeline where the search stops between its levels. Raises UnsupportedPolicyError."""
    from pipeline.generators.probe.probe import probe

    if search.looks_ahead and policy.probed is None:
        policy.probed = probe(policy.pipeline, list(prompts[:3]))


class TakeSearcher:
    """Runs one search on a policy. Raises the errors of `Search.check` when it is made."""

    def __init__(
        self,
        policy: Policy,
        search: Search,
        runners: dict[str, RewardRunner],
        steps: int,
        prompts: Sequence[PromptItem],
    ) -> None:
        from pipeline.search.walk import Steering, sampling_of

        probe_for(policy, search, prompts)
        self.policy, self.search, self.runners = policy, search, runners
        self.steering = Steering(runners, policy.cfg.reward_weights)
        self.sampling = sampling_of(search, policy, steps)
        search.check(self._task(0))

    def _task(self, seed: int) -> Task:
        return Task(steps=self.sampling.num_steps, noisy=self.sampling.stochastic_steps, seed=seed)

    def find(self, wanted: list[Wanted], pictures: bool = False, progress: Progress | None = None) -> SearchedTakes:
        """The takes of one chunk."""
        from pipeline.search.run import run_searches
        from pipeline.search.walk import PolicyWalk, score_all

        prompts = [take.prompt for take in wanted]
        walk = PolicyWalk(self.policy, self.sampling, self.steering, prompts, self.policy.cfg.evaluation.batch)
        tasks = [self._task(take.seed) for take in wanted]
        found = run_searches(self.search, tasks, walk, pictures, progress)
        frames = [one.best.frames for one in found if one.best.frames is not None]
        media = Media(frames=np.stack(frames), fps=self.policy.cfg.generator.fps)
        return SearchedTakes(wanted, tasks, found, media, score_all(self.runners, media, prompts))
