"""Which rewards judge a prompt's takes: `metadata: {rewards: [ocr, pickscore]}` in the prompt set; without it, all do.

The names are those of the config. A reward that does not apply to a take has no score there: NaN in `RewardScores`,
absent from the combination, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.core.errors import InputError
from pipeline.core.files import did_you_mean
from pipeline.core.types import Media, PromptItem, RewardScores

KEY = "rewards"  # of a prompt's metadata


def applies(reward: str, prompt: PromptItem) -> bool:
    """Whether `reward` (its name in the config) judges takes of `prompt`."""
    names = prompt.metadata.get(KEY)
    return names is None or reward in names


def check_routing(prompts: Sequence[PromptItem], rewards: Sequence[str], places: Sequence[str], path: Path) -> None:
    """`places`: 'line 3' of each prompt of `path`. Raises `InputError` for a prompt that names no or other rewards."""
    for prompt in prompts:
        names = prompt.metadata.get(KEY)
        if names is None:
            continue
        where = f"{path}, {places[prompt.index]}: metadata.{KEY}"
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(
                f"{where}: found {names!r:.60}; expected a list of the config's rewards, such as [{rewards[0]}], or "
                "leave it out where all apply"
            )
        for name in names:
            if name not in rewards:
                hint = did_you_mean(name, rewards) or f"; there are: {', '.join(rewards)}"
                raise InputError(f"{where}: the config has no reward {name!r}{hint}")


def score_some(
    score: Callable[[Media, list[PromptItem]], RewardScores], media: Media, prompts: Sequence[PromptItem], name: str
) -> RewardScores:
    """`score` of the takes that reward `name` applies to, media [K, ...]; NaN for the others."""
    chosen = [i for i, prompt in enumerate(prompts) if applies(name, prompt)]
    takes = len(prompts)
    if len(chosen) == takes:
        return score(media, list(prompts))
    if not chosen:
        return RewardScores(values=np.full(takes, np.nan, np.float32))
    scores = score(Media(frames=media.frames[chosen], fps=media.fps), [prompts[i] for i in chosen])

    def spread(values: np.ndarray) -> np.ndarray:
        whole = np.full((takes, *values.shape[1:]), np.nan, values.dtype)
        whole[chosen] = values
        return whole

    weights, per_segment, variance = scores.segment_weights, scores.segment_values, scores.variance
    return replace(
        scores,
        values=spread(scores.values),
        variance=None if variance is None else spread(variance),
        segment_values=None if per_segment is None else spread(per_segment),
        segment_weights=spread(weights) if weights is not None and weights.ndim == 2 else weights,
        parts={key: spread(part) for key, part in scores.parts.items()},
    )
