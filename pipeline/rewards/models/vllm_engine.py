"""vLLM's engine in the reward server's own process, as the model behind a judge.

All questions of a call go to the engine as one list: it batches them continuously, and what they have in common from
their first token on (the rubric's system message; in edits also the source picture) is computed once and kept (prefix
caching). Only safetensors are loaded, and no code out of a checkpoint runs.

vLLM's pins differ from Rushes', so it needs its own environment (`jobs.setup_vllm`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.messages import show
from pipeline.core.errors import ConfigError, InputError, RewardError, one_line
from pipeline.core.files import did_you_mean
from pipeline.rewards.models.chat import Answer, ChatModel, Question
from pipeline.rewards.models.images import shrunk
from pipeline.rewards.models.rubric import bare

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

# What `engine:` may set, under vLLM's own names. Left out on purpose: whatever loads other files than safetensors, runs
# a checkpoint's code, or is the judge's to say (pictures per question, seeds).
OPTIONS: dict[str, type | tuple[type, ...]] = {
    "block_size": int,
    "cpu_offload_gb": (int, float),
    "dtype": str,
    "enable_prefix_caching": bool,
    "enforce_eager": bool,
    "gpu_memory_utilization": (int, float),
    "kv_cache_dtype": str,
    "kv_cache_memory_bytes": int,
    "max_model_len": int,
    "max_num_batched_tokens": int,
    "max_num_seqs": int,
    "mm_processor_cache_gb": (int, float),
    "mm_processor_kwargs": dict,
    "quantization": str,
    "revision": str,
    "tensor_parallel_size": int,
    "tokenizer": str,
}
MAX_WORDS = 128  # log-probabilities that vLLM gives for one token
ABSENT = (
    "vLLM is not in this environment: make one that has it by `make setup-vllm` and name it in the reward's "
    "`runtime_env: {py_executable: .venv-vllm/bin/python}` (without a config: .venv-vllm/bin/python -m jobs.cli ...), "
    "or set base_url to an endpoint"
)
# vLLM reads these when it is imported. One process, so that the server that holds the engine ends with it.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # a CPU is warned of at every step
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the reward's `threads` and Ray's placement decide
}


def check_engine(options: Any) -> None:
    """The names and kinds of `engine:`. Raises `ConfigError`."""
    if options is None:
        return
    if not isinstance(options, dict):
        raise ConfigError(f"engine: found {options!r:.60}; expected options of vLLM such as {{max_model_len: 8192}}")
    for key, value in options.items():
        if key not in OPTIONS:
            hint = did_you_mean(str(key), OPTIONS) or f"; there are: {', '.join(OPTIONS)}"
            raise ConfigError(f"engine.{key}: cannot be set{hint}")
        kind = OPTIONS[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = {int: "a whole number", bool: "true or false", str: "a text", dict: "a mapping"}
            expected = "a number" if isinstance(kind, tuple) else kinds[kind]
            raise ConfigError(f"engine.{key}: found {show(value)}; expected {expected}")


class Engine(ChatModel):
    """The model of a hub id or folder. `pictures`: the most in one question. `words`: answers whose first-token
    probabilities are needed."""

    def __init__(
        self, model: str, pictures: int, words: tuple[str, ...], max_side: int, options: dict[str, Any] | None = None
    ) -> None:
        check_engine(options)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(f"{ABSENT} ({error})") from error
        self.name, self.max_side = model, max_side
        settings: dict[str, Any] = {
            "enable_prefix_caching": True,
            "max_model_len": -1,  # as long as the memory for it lasts
            "mm_processor_cache_gb": 0.5,  # pictures come back within a call only: duels and retries
        }
        if current_platform.is_cpu():
            # nothing is gained by compiling there, and by default most of the machine's memory would be taken
            settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}
        settings |= options or {}
        if settings.get("tensor_parallel_size", 1) > 1:
            settings["distributed_executor_backend"] = "mp"  # the GPUs are this actor's, not Ray's to place
        try:
            self.llm = LLM(
                model=model,
                load_format="safetensors",
                trust_remote_code=False,
                generation_config="vllm",  # the checkpoint's own sampling defaults are for chatting
                limit_mm_per_prompt={
                    "image": {"count": pictures, "width": max_side, "height": max_side},
                    "video": 0,
                },
                seed=0,
                **settings,
            )
        except Exception as error:  # anything from a missing file to too little memory
            why = one_line(error, 600)
            raise InputError(f"judge {model}: vLLM could not start: {type(error).__name__}: {why:.600}") from error
        self.tokenizer = self.llm.get_tokenizer()
        added = self.tokenizer.added_tokens_decoder.values()
        self.special_tokens = tuple(str(token) for token in added if token.special)
        self._ids: dict[tuple[str, ...], dict[int, str]] = {}
        if words:
            self._tokens(words)  # a word without a token is an error in the rubric: raise at start

    def show(self, takes: Sequence[Sequence[np.ndarray]]) -> list[list[dict[str, Any]]]:
        return [
            [{"type": "image_pil", "image_pil": shrunk(frame, self.max_side)} for frame in frames] for frames in takes
        ]

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        conversations = [question.messages() for question in questions]
        sampling = [self._sampling(question) for question in questions]
        outputs = self.llm.chat(conversations, sampling, use_tqdm=False)
        if len(outputs) != len(questions):
            raise RewardError(f"vLLM gave {len(outputs)} answers to {len(questions)} questions")
        return [self._answer(q, output) for q, output in zip(questions, outputs, strict=True)]

    def _sampling(self, question: Question) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=question.temperature,
            max_tokens=question.max_tokens,
            seed=question.seed,
            logprob_token_ids=list(self._tokens(question.words)) if question.words else None,
        )

    def _answer(self, question: Question, output: RequestOutput) -> Answer:
        completion = output.outputs[0]
        first: tuple[tuple[str, float], ...] = ()
        if question.words:
            assert completion.logprobs is not None
            tokens = self._tokens(question.words)
            first = tuple((word, completion.logprobs[0][token].logprob) for token, word in tokens.items())
        return Answer(
            text=completion.text,
            cut=completion.finish_reason == "length",
            first=first,
            cached=(output.num_cached_tokens or 0) / len(output.prompt_token_ids or [0]),
        )

    def _tokens(self, words: tuple[str, ...]) -> dict[int, str]:
        """All tokens of the vocabulary that spell one of these words: {id: text}. Raises `ConfigError`."""
        if words not in self._ids:
            texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
            tokens = {i: text for i, text in enumerate(texts) if bare(text) in words}
            missing = [word for word in words if word not in {bare(text) for text in tokens.values()}]
            if missing:
                raise ConfigError(f"rubric: no single token of {self.name} says {missing[0]!r}; use other words")
            if len(tokens) > MAX_WORDS:
                raise ConfigError(f"rubric: {len(tokens)} tokens say one of {words}; at most {MAX_WORDS} can be asked")
            self._ids[words] = tokens
        return self._ids[words]
