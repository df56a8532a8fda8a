"""Where a VLM judge's questions go: an OpenAI-compatible endpoint, or vLLM's engine in this process.

A `ChatModel` is handed all the questions of a call at once and answers them in order; what is asked and how an answer
is read is not its business (`pipeline.rewards.scorers.vlm_judge`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from pipeline.core.errors import ConfigError, RewardError
from pipeline.rewards.models.pretrained import check_batch
from pipeline.rewards.models.web import JsonClient, png_base64

S = TypeVar("S")
T = TypeVar("T")
TOP = 20  # candidates for a token that endpoints send at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    system: str | None
    content: list[dict[str, Any]]  # message parts: texts, and pictures as `ChatModel.show` gave them
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    words: tuple[str, ...] = ()  # wanted: how probable each is as the answer's first token

    def messages(self) -> list[dict[str, Any]]:
        """The system message comes first, before the pictures: what all questions share is then computed once."""
        asked: list[dict[str, Any]] = [{"role": "user", "content": self.content}]
        return [{"role": "system", "content": self.system}, *asked] if self.system else asked


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    text: str
    cut: bool = False  # at max_tokens
    first: tuple[tuple[str, float], ...] = ()  # (token, log-probability) of candidates for the first token
    cached: float = float("nan")  # share of the question's tokens that were not computed again; NaN: not known


class ChatModel(ABC):
    name: str
    steering: tuple[str, ...] = ()  # the model's own words, which no prompt may hold, as far as they are known

    @abstractmethod
    def show(self, takes: Sequence[Sequence[np.ndarray]]) -> list[list[dict[str, Any]]]:
        """The message parts of each take's frames, uint8 [H, W, 3] each."""

    @abstractmethod
    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """All answers, in order. Raises `RewardError` if one cannot be had."""


class Endpoint(ChatModel):
    """`/chat/completions` of vLLM, SGLang or a cloud. Pictures are sent as PNG."""

    def __init__(
        self,
        base_url: str,
        model: str,
        max_side: int = 512,
        api_key_env: str | None = None,
        parallel: int = 8,
        timeout_s: float = 120.0,
        retries: int = 2,
    ) -> None:
        self.client = JsonClient(base_url, api_key_env, timeout_s, retries)
        self.name, self.max_side, self.parallel = model, max_side, check_batch(parallel, "parallel")

    def show(self, takes: Sequence[Sequence[np.ndarray]]) -> list[list[dict[str, Any]]]:
        return self._each(lambda frames: [self._picture(frame) for frame in frames], takes)

    def _picture(self, frame: np.ndarray) -> dict[str, Any]:
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{png_base64(frame, self.max_side)}"},
        }

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        return self._each(self._ask, questions)

    def _ask(self, question: Question) -> Answer:
        payload = {
            "model": self.name,
            "messages": question.messages(),
            "temperature": question.temperature,
            "max_tokens": question.max_tokens,
            "seed": question.seed,
        }
        if question.words:
            payload |= {"logprobs": True, "top_logprobs": TOP}
        body = self.client.post("/chat/completions", payload)
        try:
            choice = body["choices"][0]
            message = choice["message"]
        except (TypeError, KeyError, IndexError) as error:
            raise RewardError(f"the endpoint's answer is no chat completion: {str(body)[:120]}") from error
        content = message.get("content") if isinstance(message, dict) else None
        return Answer(
            text=content if isinstance(content, str) else "",
            cut=choice.get("finish_reason") == "length",
            first=_first_token(choice) if question.words else (),
        )

    def _each(self, work: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """In parallel, in order; the first failure is raised and what has not started is dropped."""
        with ThreadPoolExecutor(max_workers=min(self.parallel, len(items))) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _first_token(choice: dict) -> tuple[tuple[str, float], ...]:
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        candidates = tuple((str(entry["token"]), float(entry["logprob"])) for entry in top)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise RewardError("the endpoint sent no log-probabilities; it must support top_logprobs") from error
    if any(log_prob > 1e-6 for _, log_prob in candidates):
        raise RewardError(f"the endpoint sent log-probabilities above 0: {candidates[:3]}")
    return candidates


# Options that only one of the two kinds has.
_ENDPOINT = ("api_key_env", "parallel", "timeout_s", "retries")


def check_where(args: dict[str, Any]) -> None:
    """Whether a judge's options say one place. Raises `ConfigError`."""
    if args.get("base_url") is not None:
        if args.get("engine"):
            raise ConfigError("engine: its options are for vLLM in the reward server; leave it or base_url out")
        return
    for key in _ENDPOINT:
        if key in args:
            raise ConfigError(f"{key}: only an endpoint has it; set base_url too, or leave it out")
    from pipeline.rewards.models.vllm_engine import check_engine

    check_engine(args.get("engine"))


def chat_model(
    base_url: str | None,
    model: str,
    engine: dict[str, Any] | None,
    pictures: int,
    words: tuple[str, ...],
    max_side: int,
    **endpoint: Any,
) -> ChatModel:
    """The endpoint, or with `base_url` None vLLM's engine with the weights `model`. `pictures`: most in a question;
    `words`: those of its questions, if they have some."""
    if base_url is not None:
        return Endpoint(base_url, model, max_side, **endpoint)
    from pipeline.rewards.models.vllm_engine import Engine

    return Engine(model, pictures, words, max_side, engine)
