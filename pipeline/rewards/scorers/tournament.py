"""Who wins most? A pairwise judge as a reward: every take meets others of its prompt, and its win rate is its score.

For judges that only compare (UnifiedReward-Think, or a function of yours). Each match is played in both orders, so that
a judge who favours the first place favours nobody. The scores of a group are relative to that group: their mean is
always 0.5, so a rising win rate is not a rising quality, and held-out means say nothing. Use it beside a reward with a
scale of its own, and evaluate on that one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.function import is_function_spec, load_function
from pipeline.rewards.scorers.vlm_judge import matches


class PairwiseJudge(ABC):
    """What a scorer of its own may be besides: a judge of pairs."""

    @abstractmethod
    def compare(self, first: Media, second: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        """P(first is better) float [N] of N pairs, media [N, F, H, W, 3]; 0.5: as good. Raises rather than guesses."""


class _FunctionJudge(PairwiseJudge):
    """`file.py:function(frames_a, frames_b, prompt) -> P(a is better)`; frames uint8 [F, H, W, 3]."""

    def __init__(self, spec: str, options: dict[str, Any]) -> None:
        self.spec, self.function, self.options = spec, load_function(spec), options

    def compare(self, first: Media, second: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        found = []
        for a, b, prompt in zip(first.frames, second.frames, prompts, strict=True):
            value = self.function(a, b, prompt.text, **self.options)
            if value is None or np.ndim(value) != 0 or isinstance(value, str | bytes | dict):
                raise TypeError(f"the judge returned {value!r:.60} instead of one number from 0 to 1")
            found.append(float(value))
        return np.asarray(found)


@register("tournament")
class Tournament(Scorer):
    """Win rate of each take against others of its prompt, by any judge of pairs (0 to 1, 0.5 on average)."""

    reads = "video"  # a judge sees whole takes: single frames of different moments must not meet
    relative = True  # a take's score depends on the takes beside it

    def __init__(self, judge: str, opponents: int = 0, batch: int = 16, args: dict[str, Any] | None = None) -> None:
        """`judge`: file.py:function, or a scorer that compares; `args`: its options. `opponents`: of each take, the
        next in a circle; 0: all others. `batch`: matches per call of the judge."""
        for key, value, least in (("opponents", opponents, 0), ("batch", batch, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{key}: found {value!r}; expected a whole number of at least {least}")
        self.name, self.opponents, self.batch = judge, opponents, batch
        self.judge = _build(judge, args)

    @classmethod
    def check_args(cls, args: dict) -> None:
        from pipeline.rewards.runner import scorer_class

        judge = args["judge"]
        if not isinstance(judge, str) or not judge:
            raise ConfigError(f"judge: found {judge!r}; expected file.py:function or a scorer that compares")
        if not is_function_spec(judge) and not issubclass(scorer_class(judge), PairwiseJudge):
            raise ConfigError(f"judge: {judge} scores takes one by one, it does not compare; use it without tournament")

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        """Parts: `matches` played; `contradictions`, the share of them whose winner changed with the order."""
        groups: dict[tuple[int, str], list[int]] = defaultdict(list)
        for k, prompt in enumerate(prompts):
            groups[prompt.index, prompt.text].append(k)
        alone = [text for (_, text), takes in groups.items() if len(takes) < 2]
        if alone:
            raise RewardError(f"a tournament needs two or more takes of a prompt; {alone[0][:40]!r} has one")
        pairs = [(t[a], t[b]) for t in groups.values() for a, b in matches(len(t), self.opponents)]
        chance = np.concatenate(
            [
                self._play(pairs[start : start + self.batch], media, prompts)
                for start in range(0, len(pairs), self.batch)
            ]
        )
        won, played = np.zeros(len(prompts)), np.zeros(len(prompts))
        turned = np.zeros(len(prompts))
        winners: dict[tuple[int, int], float] = dict(zip(pairs, chance, strict=True))
        for (a, b), p in winners.items():
            won[a] += p
            won[b] += 1 - p
            played[[a, b]] += 1
            if (p - 0.5) * (winners[b, a] - 0.5) > 0:  # both times the first one, or both times the second
                turned[[a, b]] += 1
        return {"score": won / played, "matches": played, "contradictions": turned / played}

    def _play(self, pairs: list[tuple[int, int]], media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        first, second = (Media(frames=media.frames[[pair[i] for pair in pairs]], fps=media.fps) for i in (0, 1))
        chance = np.asarray(self.judge.compare(first, second, [prompts[a] for a, _ in pairs]), np.float64)
        if chance.shape != (len(pairs),) or not ((chance >= 0) & (chance <= 1)).all():  # NaN is outside, too
            shown = chance.ravel()[:4].tolist()
            raise RewardError(
                f"the judge {self.name} gave {shown} (shape {list(chance.shape)}) for {len(pairs)} pairs; expected the "
                "probability from 0 to 1 that the first is better, for each"
            )
        return chance


def _build(judge: str, args: dict[str, Any] | None) -> PairwiseJudge:
    from pipeline.config.schema import RewardConfig
    from pipeline.rewards.runner import build_scorer

    if is_function_spec(judge):
        return _FunctionJudge(judge, args or {})
    scorer = build_scorer(judge, RewardConfig(scorer=judge, args=args or {})).scorer
    assert isinstance(scorer, PairwiseJudge)  # `check_args` has said so
    return scorer
