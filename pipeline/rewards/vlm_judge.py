"""A vision-language model as a judge, behind any OpenAI-compatible endpoint (vLLM, SGLang, a cloud).

What is asked and how the answer is read is the rubric's (`pipeline.rewards.rubric`). Each clip is sent once, as PNG
frames in one request; a pairwise tournament sends one request a match. An answer that does not follow the rubric is
asked for again, then the scoring fails: it is never a score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from pipeline.errors import ConfigError, RewardError
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.pretrained import check_number
from pipeline.rewards.rubric import Rubric, Unparseable, load_rubric
from pipeline.rewards.web import JsonClient, png_base64
from pipeline.types import Media, PromptItem

T = TypeVar("T")


def matches(takes: int, opponents: int) -> list[tuple[int, int]]:
    """Ordered pairs (shown first, shown second): each take meets its next `opponents` neighbours in a circle, in both
    orders, so that a judge who favours a place favours nobody. 0: everybody meets everybody."""
    far = takes - 1 if opponents == 0 else min(opponents, takes - 1)
    pairs = {frozenset((i, (i + d) % takes)) for i in range(takes) for d in range(1, far + 1)}
    ordered = sorted(tuple(sorted(pair)) for pair in pairs)
    return [(a, b) for a, b in ordered] + [(b, a) for a, b in ordered]


@register("vlm_judge")
class VlmJudge(Scorer):
    """A vision-language model asked by a rubric: ratings, P(yes), or win rate within the group (all 0 to 1)."""

    reads = "video"

    def __init__(
        self,
        base_url: str,
        model: str,
        rubric: str = "alignment_quality",
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
        """`base_url`: up to and with /v1. `rubric`: a YAML file or one that ships. `frames`: shown of a clip, evenly
        spaced. `attempts`: tries for an answer that can be read. `opponents`: per take in a pairwise rubric, 0 all."""
        numbers = (("frames", frames, 1), ("max_side", max_side, 28), ("attempts", attempts, 1))
        for key, value, least in (*numbers, ("opponents", opponents, 0), ("parallel", parallel, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{key}: found {value!r}; expected a whole number of at least {least}")
        self.rubric: Rubric = load_rubric(rubric)
        self.relative = self.rubric.mode == "pairwise"
        self.client = JsonClient(base_url, api_key_env, timeout_s, retries)
        self.model, self.frames, self.max_side = model, frames, max_side
        self.temperature = check_number("temperature", temperature, 0.0, 2.0)
        self.attempts, self.opponents, self.parallel = attempts, opponents, parallel

    @classmethod
    def check_args(cls, args: dict) -> None:
        load_rubric(args.get("rubric", "alignment_quality"))

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray | dict[str, np.ndarray]:
        pictures = self._each(lambda take: self._pictures(take), list(media.frames))
        if self.rubric.mode == "pairwise":
            return self._tournament(pictures, prompts, media.fps)
        read = self._ask_yes_no if self.rubric.mode == "yes_no" else self._ask_likert
        rows = self._each(lambda i: read(pictures[i], prompts[i], media.fps), list(range(len(prompts))))
        return {key: np.asarray([row[key] for row in rows], dtype=np.float32) for key in rows[0]}

    def _each(self, work: Callable[[Any], T], items: list) -> list[T]:
        """In parallel, in order; the first failure is raised and what has not started is dropped."""
        with ThreadPoolExecutor(max_workers=min(self.parallel, len(items))) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _pictures(self, frames: np.ndarray) -> list[dict[str, Any]]:
        """The message parts that show one take uint8 [F, H, W, 3]."""
        count = min(self.frames, len(frames))
        chosen = [(2 * i + 1) * len(frames) // (2 * count) for i in range(count)]
        return [self._picture(frames[i]) for i in chosen]

    def _picture(self, frame: np.ndarray) -> dict[str, Any]:
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{png_base64(frame, self.max_side)}"},
        }

    def _source(self, prompt: PromptItem) -> list[dict[str, Any]]:
        if not self.rubric.source:
            return []
        from pipeline.rewards.subject import read_picture

        if not prompt.image:
            raise RewardError(f"the rubric shows the source picture, but prompt {prompt.index} has no image")
        return [self._picture(read_picture(prompt.image))]

    def _ask(self, content: list[dict[str, Any]], read: Callable[[dict], T], **options: Any) -> T:
        """One question, asked until the answer can be read. Raises `RewardError` after `attempts`."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.rubric.system:
            messages.insert(0, {"role": "system", "content": self.rubric.system})
        for attempt in range(self.attempts):
            # a repeated question at temperature 0 would get the same answer again
            temperature = self.temperature if attempt == 0 else max(self.temperature, 0.7)
            payload = {
                "model": self.model,
                "messages": messages,
                "temperature": temperature,
                "max_tokens": self.rubric.max_tokens,
                "seed": attempt,
                **options,
            }
            answer = self.client.post("/chat/completions", payload)
            try:
                return read(_choice(answer))
            except Unparseable as error:
                last = error
        raise RewardError(f"the judge {self.model} gave no readable answer in {self.attempts} tries: {last}") from last

    def _ask_likert(self, pictures: list, prompt: PromptItem, fps: float) -> dict[str, float]:
        return self._ask(
            [*self._source(prompt), *pictures, _text(self.rubric.fill(prompt, len(pictures), fps))],
            lambda choice: self.rubric.read_likert(_content(choice)),
        )

    def _ask_yes_no(self, pictures: list, prompt: PromptItem, fps: float) -> dict[str, float]:
        return self._ask(
            [*self._source(prompt), *pictures, _text(self.rubric.fill(prompt, len(pictures), fps))],
            lambda choice: {"score": self.rubric.read_yes_no(_first_token(choice))},
            logprobs=True,
            top_logprobs=20,
        )

    def _tournament(self, pictures: list, prompts: Sequence[PromptItem], fps: float) -> dict[str, np.ndarray]:
        """Win rate of each take among the takes of the same prompt."""
        groups: dict[tuple[int, str], list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            groups[prompt.index, prompt.text].append(i)
        alone = [text for (_, text), takes in groups.items() if len(takes) < 2]
        if alone:
            raise RewardError(f"a pairwise rubric needs two or more takes of a prompt; {alone[0][:40]!r} has one")
        pairs = [(t[a], t[b]) for t in groups.values() for a, b in matches(len(t), self.opponents)]
        better = self._each(lambda p: self._match(pictures[p[0]], pictures[p[1]], prompts[p[0]], fps), pairs)
        won, played = np.zeros(len(prompts)), np.zeros(len(prompts))
        for pair, chance in zip(pairs, better, strict=True):
            won[list(pair)] += chance, 1 - chance
            played[list(pair)] += 1
        return {"score": won / played, "matches": played}

    def _match(self, first: list, second: list, prompt: PromptItem, fps: float) -> float:
        """How far the first of two takes (as message parts) is better: 0 to 1."""
        labels = ([_text("Image 1:")], [_text("Image 2:")]) if self.rubric.labels else ([], [])
        shown = [*labels[0], *first, *labels[1], *second]
        question = _text(self.rubric.fill(prompt, len(first), fps))
        return self._ask(
            [*self._source(prompt), *shown, question], lambda choice: self.rubric.read_preference(_content(choice))
        )


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _choice(answer: Any) -> dict:
    """The first choice of a chat completion. Raises `RewardError` if the server does not speak the protocol."""
    try:
        choice = answer["choices"][0]
        choice["message"]
    except (TypeError, KeyError, IndexError) as error:
        raise RewardError(f"the endpoint's answer is no chat completion: {str(answer)[:120]}") from error
    return choice


def _content(choice: dict) -> str:
    content = choice["message"].get("content") if isinstance(choice["message"], dict) else None
    if not isinstance(content, str) or not content.strip():
        raise Unparseable("the answer is empty")
    if choice.get("finish_reason") == "length":
        raise Unparseable(f"the answer was cut off at max_tokens: …{content[-60:]!r}")
    return content


def _first_token(choice: dict) -> list[tuple[str, float]]:
    """(text, log-probability) of the candidates for the answer's first token."""
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        candidates = [(str(entry["token"]), float(entry["logprob"])) for entry in top]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise RewardError("the endpoint sent no log-probabilities; it must support top_logprobs") from error
    if any(log_prob > 1e-6 for _, log_prob in candidates):
        raise RewardError(f"the endpoint sent log-probabilities above 0: {candidates[:3]}")
    return candidates
