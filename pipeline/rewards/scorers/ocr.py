"""Text rendering: is the text that the prompt puts in double quotes written in the picture? Read by RapidOCR."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pipeline.config.messages import show
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.pretrained import check_number

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]')


def target_text(prompt: PromptItem) -> str:
    """The text to be written: metadata `text`, else what stands between the prompt's first double quotes, straight or
    curly. Raises `RewardError` if there is nothing."""
    given = prompt.metadata.get("text")
    if given is None:
        match = _QUOTED.search(prompt.text)
        given = next((group for group in match.groups() if group), None) if match else None
    if not isinstance(given, str) or not normalised(given):
        raise RewardError(f"the prompt {prompt.text[:60]!r} asks for no text; put the text to write in double quotes")
    return given


def normalised(text: str) -> str:
    return re.sub(r"\s+", "", text).lower()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def accuracy(read: str, target: str) -> float:
    """1 - min(distance, n) / n with n the target's length; 1 if the target is part of what was read."""
    read, target = normalised(read), normalised(target)
    if target in read:
        return 1.0
    return 1.0 - min(edit_distance(read, target), len(target)) / len(target)


@register("ocr")
class Ocr(Scorer):
    """How much of the text in the prompt's double quotes can be read in the picture (0 to 1; RapidOCR)."""

    reads = "frame"
    tested_with = "published weights"
    gradient_note = (
        "its text recogniser is an ONNX file; use hpsv3, or a recogniser in torch as your own function that "
        "takes pixels"
    )

    def __init__(self, confidence: float = 0.5, threads: int = 1) -> None:
        """`confidence`: readings below it are left out. `threads`: of the OCR models."""
        check_number("confidence", confidence, 0.0, 1.0)
        if not isinstance(threads, int) or threads < 1:
            raise ConfigError(f"threads: found {show(threads)}; expected a whole number of at least 1")
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ConfigError(
                f"the scorer ocr needs rapidocr-onnxruntime ({error}); run: pip install 'rushes[ocr]'"
            ) from error
        self.engine = RapidOCR(
            text_score=confidence,
            intra_op_num_threads=threads,
            inter_op_num_threads=1,
            det_limit_type="max",  # PaddleOCR's rule: only shrink; RapidOCR's enlarges to 736 pixels, 10 times slower
            det_limit_side_len=960,
        )

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        targets = [target_text(prompt) for prompt in prompts]
        return np.asarray(
            [accuracy(self.read(frame), text) for frame, text in zip(media.frames[:, 0], targets, strict=True)],
            dtype=np.float32,
        )

    def read(self, frame: np.ndarray) -> str:
        """All readings of uint8 [H, W, 3], top to bottom. A crash of the OCR is a `RewardError`, nothing read is ''."""
        try:
            lines, _ = self.engine(np.ascontiguousarray(frame[..., ::-1]))  # it takes BGR
        except Exception as error:  # onnxruntime and OpenCV raise their own types
            raise RewardError(f"the OCR failed on a picture of shape {list(frame.shape)}: {error}") from error
        return "".join(text for _, text, _ in lines or [])
