"""A reward that another program computes: JSON over HTTP, pixels as PNG, mp4 or safetensors in base64, never pickle.

POST url
{"version": 1, "items": [{"prompt": "a red cat", "metadata": {}, "fps": 8.0,
                          "frames": ["<png in base64>", …]            # encoding: png
                          "video": "<mp4 in base64>"                  # encoding: mp4, instead of frames
                          "tensor": "<safetensors in base64>",        # encoding: safetensors, instead of frames
                          "image": "<png in base64>"}]}               # the prompt's own picture, where it has one
-> {"scores": [0.7, …], "parts": {"colour": [0.9, …]}}                # one number an item; parts may be left out

`rushes serve-reward` answers this for any scorer (`pipeline.rewards.models.protocol` has the types).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.reading import shown
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.pretrained import batches, check_batch, check_choice
from pipeline.rewards.models.prompt_pictures import read_picture
from pipeline.rewards.models.protocol import ENCODINGS, encode_frames
from pipeline.rewards.models.web import JsonClient, png_base64


@register("http")
class HttpScorer(Scorer):
    """Scores of a remote server: JSON over HTTP with PNG, mp4 or safetensors (docs/rewards.md has the protocol)."""

    reads: Literal["frame", "video"] = "video"  # each as it is set up
    tested_with = "a stand-in server"
    gradient_note = "gradients do not cross HTTP; use the scorer itself, or your own function that takes pixels"

    def __init__(
        self,
        url: str,
        reads: Literal["frame", "video"] = "frame",
        encoding: str = "png",
        api_key_env: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 2,
        batch: int = 16,
    ) -> None:
        """`reads`: frame (videos go through segments) or video. `encoding`: mp4 is lossy, safetensors quick."""
        check_choice("reads", reads, ("frame", "video"))
        self.reads = reads
        self.encoding = check_choice("encoding", encoding, ENCODINGS)
        if (reads, encoding) == ("frame", "mp4"):
            raise ConfigError("encoding: found 'mp4' for single frames; use png or safetensors, or reads: video")
        self.client = JsonClient(url, api_key_env, timeout_s, retries)
        self.batch = check_batch(batch)

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        answers = []
        for part in batches(len(prompts), self.batch):
            items = [self._item(f, p, media.fps) for f, p in zip(media.frames[part], prompts[part], strict=True)]
            answers.append(parse_answer(self.client.post("", {"version": 1, "items": items}), len(items)))
        names = set(answers[0])
        if any(set(answer) != names for answer in answers):
            raise RewardError(f"{self.client.url}: its answers do not all have the same parts")
        return {name: np.concatenate([answer[name] for answer in answers]) for name in names}

    def _item(self, frames: np.ndarray, prompt: PromptItem, fps: float) -> dict[str, Any]:
        metadata, image = prompt.metadata, prompt.image
        named = [(key, path) for key, paths in prompt.files.items() for path in paths]
        if not image and len(named) == 1:  # the server reads no files: the one that there is goes along as the picture
            image = named[0][1]
            metadata = {key: value for key, value in metadata.items() if key != named[0][0]}
        item: dict[str, Any] = {"prompt": prompt.text, "metadata": plain(metadata), "fps": float(fps)}
        if image:
            item["image"] = png_base64(read_picture(image))
        return item | encode_frames(frames, fps, self.encoding)


def plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata if it is JSON. Raises `RewardError`."""
    try:
        return json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RewardError(f"the prompt's metadata cannot be sent as JSON ({error})") from error


def parse_answer(answer: Any, items: int) -> dict[str, np.ndarray]:
    """{"score": [N], part: [N]} from a server's answer, strictly checked. Raises `RewardError`."""
    if not isinstance(answer, dict) or "scores" not in answer:
        raise RewardError(f"the server's answer has no 'scores' ({str(answer)[:80]})")
    parts = answer.get("parts") or {}
    if not isinstance(parts, dict) or "score" in parts:
        raise RewardError(f"the server's 'parts' must be an object of lists without 'score', got {str(parts)[:80]}")
    return {
        "score": _numbers("scores", answer["scores"], items, finite=True),
        **{str(name): _numbers(f"parts.{name}", values, items, finite=False) for name, values in parts.items()},
    }


_LARGEST = float(np.finfo(np.float32).max)  # of a score: they are kept as float32


def _numbers(name: str, values: Any, items: int, finite: bool) -> np.ndarray:
    if not isinstance(values, list) or len(values) != items:
        got = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise RewardError(f"the server's {name} holds {got} for {items} items")
    checked = []
    for value in values:
        if value is None and not finite:
            checked.append(math.nan)  # does not apply to this item
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise RewardError(f"the server's {name} holds {shown(value)}, which is not a finite number")
        checked.append(float(value))
    return np.asarray(checked, dtype=np.float32)
