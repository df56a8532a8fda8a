"""A judge of pairs as a reward: every take meets others of its prompt, and its win rate is its score.

For judges that only compare (UnifiedReward-Think, or the user's own function). Scores are relative to their group: the
mean is always 0.5, so win rates do not measure progress, and held-out means say nothing. Use it beside a reward with an
absolute scale, and evaluate on that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.config.messages import show
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.function import call_function, is_function_spec, load_function
from pipeline.rewards.models.pairwise import Pair, PairwiseJudge, contradictions, matches_by_prompt, win_rates
from pipeline.rewards.registry import create_scorer, scorer_class


class _FunctionJudge(PairwiseJudge):
    """`file.py:function(frames_a, frames_b, prompt) -> P(a is better)`; frames uint8 [F, H, W, 3]."""

    def __init__(self, spec: str, options: dict[str, Any]) -> None:
        self.spec, self.function, self.options = spec, load_function(spec), options

    def compare(self, first: Media, second: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        calls = [
            ((a, b, prompt.text), self.options)
            for a, b, prompt in zip(first.frames, second.frames, prompts, strict=True)
        ]
        chances = []
        for value in call_function(self.function, calls):
            if value is None or np.ndim(value) != 0 or isinstance(value, str | bytes | dict):
                raise TypeError(f"the judge returned {value!r:.60} instead of one number from 0 to 1")
            chances.append(float(value))
        return np.asarray(chances)


@register("tournament")
class Tournament(Scorer):
    """Win rate of each take against others of its prompt, by any judge of pairs (0 to 1, 0.5 on average)."""

    reads = "video"  # a judge sees whole takes: single frames of different moments must not meet
    relative = True  # a take's score depends on the takes beside it
    gradient_note = "it is the share of matches won, which has no slope; use pickscore or hpsv3"

    def __init__(self, judge: str, opponents: int = 0, batch: int = 16, args: dict[str, Any] | None = None) -> None:
        """`judge`: file.py:function, or a scorer that compares; `args`: its options. `opponents`: of each take, the
        next in a circle; 0: all others. `batch`: matches per call of the judge."""
        for key, value, least in (("opponents", opponents, 0), ("batch", batch, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{key}: found {show(value)}; expected a whole number of at least {least}")
        self.name, self.opponents, self.batch = judge, opponents, batch
        self.judge = _build(judge, args)

    @classmethod
    def check_args(cls, args: dict) -> None:
        judge = args["judge"]
        if not isinstance(judge, str) or not judge:
            raise ConfigError(f"judge: found {show(judge)}; expected file.py:function or a scorer that compares")
        if is_function_spec(judge):
            load_function(judge)
        elif not issubclass(scorer_class(judge), PairwiseJudge):
            raise ConfigError(f"judge: {judge} scores takes one by one, it does not compare; use it without tournament")

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        """Parts: `matches` played; `contradictions`, the share of them whose winner changed with the order."""
        pairs = matches_by_prompt(prompts, self.opponents)
        chances = np.concatenate(
            [
                self._play(pairs[start : start + self.batch], media, prompts)
                for start in range(0, len(pairs), self.batch)
            ]
        )
        rates, played = win_rates(pairs, chances, len(prompts))
        return {"score": rates, "matches": played, "contradictions": contradictions(pairs, chances, len(prompts))}

    def _play(self, pairs: list[Pair], media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        first, second = (Media(frames=media.frames[[pair[i] for pair in pairs]], fps=media.fps) for i in (0, 1))
        chances = np.asarray(self.judge.compare(first, second, [prompts[a] for a, _ in pairs]), np.float64)
        if chances.shape != (len(pairs),) or not ((chances >= 0) & (chances <= 1)).all():  # NaN is outside, too
            raise RewardError(
                f"the judge {self.name} gave {chances.ravel()[:4].tolist()} (shape {list(chances.shape)}) for "
                f"{len(pairs)} pairs; expected the probability from 0 to 1 that the first is better, for each"
            )
        return chances


def _build(judge: str, args: dict[str, Any] | None) -> PairwiseJudge:
    if is_function_spec(judge):
        return _FunctionJudge(judge, args or {})
    scorer = create_scorer(judge, args or {})
    assert isinstance(scorer, PairwiseJudge)  # `check_args` has refused the others
    return scorer
