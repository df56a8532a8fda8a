"""Which chat model answers a VLM judge: an OpenAI-compatible endpoint, or vLLM's engine in this process."""

from __future__ import annotations

from typing import Any

from pipeline.core.errors import ConfigError
from pipeline.rewards.models.chat import ChatModel
from pipeline.rewards.models.endpoint import Endpoint
from pipeline.rewards.models.vllm_engine import Engine, check_engine

_ENDPOINT_OPTIONS = ("api_key_env", "parallel", "timeout_s", "retries")


def check_backend(args: dict[str, Any]) -> None:
    """Refuses options of one backend beside those of the other. Raises `ConfigError`."""
    if args.get("base_url") is not None:
        if args.get("engine"):
            raise ConfigError("engine: its options are for vLLM in the reward server; leave it or base_url out")
        return
    for key in _ENDPOINT_OPTIONS:
        if key in args:
            raise ConfigError(f"{key}: only an endpoint has it; set base_url too, or leave it out")
    check_engine(args.get("engine"))


def chat_backend(
    base_url: str | None,
    model: str,
    engine: dict[str, Any] | None,
    pictures: int,
    words: tuple[str, ...],
    max_side: int,
    **endpoint: Any,
) -> ChatModel:
    """The endpoint at `base_url`, or where that is None vLLM's engine with the weights `model`.

    `pictures`: most in one question. `words`: answers whose probability as first token the questions ask for.
    """
    if base_url is not None:
        return Endpoint(base_url, model, max_side, **endpoint)
    return Engine(model, pictures, words, max_side, engine)
