"""A vision-language model as a judge: behind an OpenAI-compatible endpoint, or on vLLM in the reward server itself.

The rubric defines the question and how an answer is parsed (`pipeline.rewards.models.rubric`); the chat backend
delivers the questions (`pipeline.rewards.models.chat_backend`). A question shows all frames of a clip, or both clips of
a match; all questions of a call are submitted together. An answer that does not follow the rubric is retried, and after
`attempts` tries the scoring fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from pipeline.core.errors import RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.chat import Answer, Question
from pipeline.rewards.models.chat_backend import chat_backend, check_backend
from pipeline.rewards.models.pairwise import matches_by_prompt, win_rates
from pipeline.rewards.models.pretrained import check_batch, check_number
from pipeline.rewards.models.prompt_pictures import read_picture
from pipeline.rewards.models.rubric import Rubric, Unparseable, load_rubric

T = TypeVar("T")


@register("vlm_judge")
class VlmJudge(Scorer):
    """A vision-language model that follows a rubric: ratings, P(yes), or win rate within the group (all 0 to 1)."""

    reads = "video"
    tested_with = "random weights"
    gradient_note = "a judge answers in words; use hpsv3, or video_align for clips"
    pairs = False  # whether two takes may be shown at once, whatever the rubric

    def __init__(
        self,
        model: str,
        rubric: str = "alignment_quality",
        base_url: str | None = None,
        engine: dict[str, Any] | None = None,
        api_key_env: str | None = None,
        frames: int = 8,
        max_side: int = 512,
        temperature: float = 0.0,
        attempts: int = 3,
        opponents: int = 0,
        parallel: int = 8,
        timeout_s: float = 120.0,
        retries: int = 2,
    ) -> None:
        """`model`: the endpoint's name for it; without `base_url` (up to and with /v1) a hub id or folder for vLLM's
        engine in this process, whose options are `engine`. `rubric`: a YAML file or one that ships. `frames`: shown of
        a clip, evenly spaced. `attempts`: tries for an answer that can be read. `opponents`: per take in a pairwise
        rubric, 0 all. `api_key_env`, `parallel`, `timeout_s`, `retries`: an endpoint's."""
        for key, value, least in (("max_side", max_side, 28), ("opponents", opponents, 0)):
            check_batch(value, key, least)
        self.rubric: Rubric = load_rubric(rubric)
        self.relative = self.rubric.mode == "pairwise"
        self.frames, self.attempts = check_batch(frames, "frames"), check_batch(attempts, "attempts")
        self.temperature, self.opponents = check_number("temperature", temperature, 0.0, 2.0), opponents
        most = frames * (2 if self.relative or self.pairs else 1) + self.rubric.source
        endpoint = {"api_key_env": api_key_env, "parallel": parallel, "timeout_s": timeout_s, "retries": retries}
        words = tuple(self.rubric.answers)
        self.chat = chat_backend(base_url, model, engine, most, words, max_side, **endpoint)

    @classmethod
    def check_args(cls, args: dict) -> None:
        load_rubric(args.get("rubric", "alignment_quality"))
        check_backend(args)

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray | dict[str, np.ndarray]:
        pictures = self._pictures(media)
        if self.rubric.mode == "pairwise":
            return self._tournament(pictures, prompts, media.fps)
        questions = [self._question(shown, p, media.fps) for shown, p in zip(pictures, prompts, strict=True)]
        rows, answers = self._ask(questions, self._read)
        parts = {key: np.asarray([row[key] for row in rows], dtype=np.float32) for key in rows[0]}
        return parts | _cached(answers)

    def _read(self, answer: Answer) -> dict[str, float]:
        if self.rubric.answers:
            return {"score": self.rubric.read_first(answer.first)}
        return self.rubric.read_likert(_text_of(answer))

    def _pictures(self, media: Media) -> list[list[dict[str, Any]]]:
        """The message parts that show each take [F, H, W, 3]: the middles of equal parts of it."""
        length = media.frames.shape[1]
        count = min(self.frames, length)
        chosen = [(2 * i + 1) * length // (2 * count) for i in range(count)]
        return self.chat.show([[take[i] for i in chosen] for take in media.frames])

    def _question(
        self, shown: list[dict[str, Any]], prompt: PromptItem, fps: float, frames: int | None = None
    ) -> Question:
        """`frames`: of one take, where `shown` holds more."""
        text = self.rubric.fill(prompt, len(shown) if frames is None else frames, fps)
        for word in self.chat.special_tokens:
            if text.count(word) > self.rubric.prompt.count(word):
                raise RewardError(f"the prompt {prompt.text!r:.60} holds {word}, which steers the judge; take it out")
        return Question(
            system=self.rubric.system,
            content=[*self._source(prompt), *shown, _text(text)],
            max_tokens=self.rubric.max_tokens,
            temperature=self.temperature,
            words=tuple(self.rubric.answers),
        )

    def _source(self, prompt: PromptItem) -> list[dict[str, Any]]:
        if not self.rubric.source:
            return []
        if not prompt.image:
            raise RewardError(f"the rubric shows the source picture, but prompt {prompt.index} has no image")
        return self.chat.show([[read_picture(prompt.image)]])[0]

    def _ask(self, questions: Sequence[Question], read: Callable[[Answer], T]) -> tuple[list[T], list[Answer]]:
        """All questions at once; those whose answers cannot be read again. Raises `RewardError` after `attempts`."""
        results: dict[int, tuple[T, Answer]] = {}
        for attempt in range(self.attempts):
            left = [i for i in range(len(questions)) if i not in results]
            # a repeated question at temperature 0 would get the same answer again
            temperature = self.temperature if attempt == 0 else max(self.temperature, 0.7)
            batch = [replace(questions[i], temperature=temperature, seed=attempt) for i in left]
            for i, answer in zip(left, self.chat.ask(batch), strict=True):
                try:
                    results[i] = read(answer), answer
                except Unparseable as error:
                    last = error
            if len(results) == len(questions):
                values, answers = zip(*(results[i] for i in range(len(questions))), strict=True)
                return list(values), list(answers)
        raise RewardError(
            f"the judge {self.chat.name} gave no readable answer in {self.attempts} tries: {last}"
        ) from last

    def _tournament(self, pictures: list, prompts: Sequence[PromptItem], fps: float) -> dict[str, np.ndarray]:
        """Win rate of each take among the takes of the same prompt."""
        pairs = matches_by_prompt(prompts, self.opponents)
        chances = self._better([(pictures[a], pictures[b], prompts[a]) for a, b in pairs], fps)
        rates, played = win_rates(pairs, chances, len(prompts))
        return {"score": rates, "matches": played}

    def _better(self, pairs: Sequence[tuple[list, list, PromptItem]], fps: float) -> list[float]:
        """How far the first of two takes (as message parts) is better, for each pair: 0 to 1."""
        labels = ([_text("Image 1:")], [_text("Image 2:")]) if self.rubric.labels else ([], [])
        questions = [
            self._question([*labels[0], *first, *labels[1], *second], prompt, fps, len(first))
            for first, second, prompt in pairs
        ]
        return self._ask(questions, lambda answer: self.rubric.read_preference(_text_of(answer)))[0]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _text_of(answer: Answer) -> str:
    if not answer.text.strip():
        raise Unparseable("the answer is empty")
    if answer.cut:
        raise Unparseable(f"the answer was cut off at max_tokens: …{answer.text[-60:]!r}")
    return answer.text


def _cached(answers: Sequence[Answer]) -> dict[str, np.ndarray]:
    """The part `cached`, where the backend reports it."""
    shares = np.asarray([answer.cached for answer in answers], dtype=np.float32)
    return {} if np.isnan(shares).any() else {"cached": shares}
