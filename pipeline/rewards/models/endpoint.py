"""A chat model behind an OpenAI-compatible endpoint: `/chat/completions` of vLLM, SGLang or a cloud."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from pipeline.core.errors import RewardError
from pipeline.rewards.models.chat import Answer, ChatModel, Question
from pipeline.rewards.models.pretrained import check_batch
from pipeline.rewards.models.web import JsonClient, png_base64

S = TypeVar("S")
T = TypeVar("T")
TOP = 20  # candidates for a token that endpoints send at most


class Endpoint(ChatModel):
    """Sends one request a question, in parallel; pictures go as PNG."""

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
            raise RewardError(f"the endpoint's answer is not a chat completion: {str(body)[:120]}") from error
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
