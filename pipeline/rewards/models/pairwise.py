"""Judges of pairs and what is made of their verdicts: who meets whom, and how often each take wins.

Every match is played in both orders, so a judge that favours the picture shown first favours nobody.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from pipeline.core.errors import RewardError
from pipeline.core.types import Media, PromptItem

Pair = tuple[int, int]  # indices of the take shown first and the take shown second
Chances = Sequence[float] | np.ndarray  # P(first is better) of each pair


class PairwiseJudge(ABC):
    """Interface of a judge of pairs. A scorer may implement it too, and then serves as judge of a `tournament`."""

    @abstractmethod
    def compare(self, first: Media, second: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        """P(first is better) float [N] of N pairs, media [N, F, H, W, 3]; 0.5: as good. Raises rather than guesses."""


def matches(takes: int, opponents: int) -> list[Pair]:
    """Ordered pairs: each take meets its next `opponents` neighbours in a circle, in both orders. 0: all others."""
    farthest = takes - 1 if opponents == 0 else min(opponents, takes - 1)
    pairs = {frozenset((i, (i + d) % takes)) for i in range(takes) for d in range(1, farthest + 1)}
    ordered = sorted(tuple(sorted(pair)) for pair in pairs)
    return [(a, b) for a, b in ordered] + [(b, a) for a, b in ordered]


def matches_by_prompt(prompts: Sequence[PromptItem], opponents: int) -> list[Pair]:
    """The matches of all takes, each among the takes of its own prompt. Raises `RewardError` for a take alone."""
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for take, prompt in enumerate(prompts):
        groups[prompt.index, prompt.text].append(take)
    for (_, text), takes in groups.items():
        if len(takes) < 2:
            raise RewardError(f"comparing takes needs two or more takes of a prompt; {text[:40]!r} has one")
    return [(takes[a], takes[b]) for takes in groups.values() for a, b in matches(len(takes), opponents)]


def win_rates(pairs: Sequence[Pair], chances: Chances, takes: int) -> tuple[np.ndarray, np.ndarray]:
    """(share of its matches that each take wins, matches it plays), float64 [takes] each.

    A probability counts as that share of a win.
    """
    won, played = np.zeros(takes), np.zeros(takes)
    for (first, second), chance in zip(pairs, chances, strict=True):
        won[first] += chance
        won[second] += 1 - chance
        played[[first, second]] += 1
    return won / played, played


def contradictions(pairs: Sequence[Pair], chances: Chances, takes: int) -> np.ndarray:
    """Share of each take's matches whose winner changes with the order in which the two are shown, float64 [takes]."""
    chance_of = dict(zip(pairs, chances, strict=True))
    contradicted, played = np.zeros(takes), np.zeros(takes)
    for (first, second), chance in chance_of.items():
        played[[first, second]] += 1
        if (chance - 0.5) * (chance_of[second, first] - 0.5) > 0:  # the same place wins both times
            contradicted[[first, second]] += 1
    return contradicted / played
