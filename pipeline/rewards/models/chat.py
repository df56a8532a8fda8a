"""The interface of a chat model to the judges: it gets all questions of a call at once and answers them in order.

`pipeline.rewards.models.endpoint` and `pipeline.rewards.models.vllm_engine` implement it; the questions and how
an answer is parsed are up to `pipeline.rewards.scorers.vlm_judge` and its rubric.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    system: str | None
    content: list[dict[str, Any]]  # message parts: texts, and pictures as `ChatModel.show` gave them
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    words: tuple[str, ...] = ()  # the answer reports how probable each is as its first token

    def messages(self) -> list[dict[str, Any]]:
        """The system message comes first, before the pictures, so the prefix that all questions share is cached."""
        user: list[dict[str, Any]] = [{"role": "user", "content": self.content}]
        return [{"role": "system", "content": self.system}, *user] if self.system else user


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    text: str
    cut: bool = False  # at max_tokens
    first: tuple[tuple[str, float], ...] = ()  # (token, log-probability) of candidates for the first token
    cached: float = float("nan")  # share of the question's tokens that came from the prefix cache; NaN: unknown


class ChatModel(ABC):
    name: str
    special_tokens: tuple[str, ...] = ()  # of the model, where known: no prompt may contain one

    @abstractmethod
    def show(self, takes: Sequence[Sequence[np.ndarray]]) -> list[list[dict[str, Any]]]:
        """The message parts of each take's frames, uint8 [H, W, 3] each."""

    @abstractmethod
    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """All answers, in order. Raises `RewardError` if the model does not answer one."""
