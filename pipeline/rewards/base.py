"""What a scorer is, how it registers itself, and how its output is checked.

A scorer takes `Media` and one prompt per take and returns one float per take. It never guesses from shapes:
`media.frames` is always uint8 [K, F, H, W, 3]. A failure is an exception, never a score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.core.errors import RewardError
from pipeline.core.types import Media, PromptItem

if TYPE_CHECKING:
    import torch

Scored = tuple[np.ndarray, dict[str, np.ndarray]]  # scores [N] and parts [N] of one call of a scorer
ScorerCall = Callable[[Media, Sequence[PromptItem]], Scored]


class Scorer(ABC):
    """A reward. Subclasses take their options as keyword arguments of `__init__`.

    `reads = "frame"`: looks at single frames; gets F = 1, and on videos goes through the segmental wrapper.
    `reads = "video"`: gets the whole clip with its fps.

    One whose score can be differentiated defines `score_pixels` too and sets `gradient_note` to "".
    """

    reads: Literal["frame", "video"]
    needs_prompt: bool = False  # compares with the prompt's text: `rushes score` refuses files without one
    needs_clip: bool = False  # means nothing on a single picture
    relative: bool = False  # a take's score depends on the takes shown with it: groups are never joined or split
    tested_with: str = "no model"  # or: random weights, published weights, a stand-in server
    gradient_note: str = "its code is not differentiable"  # why it has no `score_pixels`; "": it has one

    @abstractmethod
    def score(self, media: Media, prompts: Sequence[PromptItem]) -> np.ndarray | dict[str, np.ndarray]:
        """Returns float [K]; or a dict with key "score" [K] and further logged parts [K] each.

        NaN in a *part* means "does not apply to this prompt"; NaN in the score is a failure.
        """

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        """pixels float32 [N, F, 3, H, W] from 0 to 1, N prompts -> scores float32 [N], with gradients to the pixels.

        F = 1 where `reads = "frame"`; of a clip, the frames that `looks_at` names. The model is frozen.
        """
        raise NotImplementedError(f"{type(self).__name__}: {self.gradient_note}")

    def looks_at(self, frames: int, fps: float) -> Sequence[int]:
        """Which frames of a clip `score_pixels` of a video scorer gets, in order. Default: all of them."""
        return range(frames)

    def finish(self, values: np.ndarray) -> np.ndarray:
        """Last step on a take's score [K], after the segments of a video have been combined. Default: unchanged."""
        return values

    def finish_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """`finish` of the scores [K] that `score_pixels` returned, with gradients."""
        return values

    @classmethod
    def check_args(cls, args: dict) -> None:
        """Checks the values of the options as far as that needs no model. Raises `ConfigError`."""
        return None

    @classmethod
    def why_no_gradient(cls, args: dict) -> str:
        """`gradient_note` with these options. Needs no model."""
        return cls.gradient_note


REGISTRY: dict[str, type[Scorer]] = {}


def register(name: str) -> Callable[[type[Scorer]], type[Scorer]]:
    """Class decorator: makes the scorer available as `scorer: <name>` in a config."""

    def add(cls: type[Scorer]) -> type[Scorer]:
        if name in REGISTRY and REGISTRY[name] is not cls:
            raise ValueError(f"two scorers are registered as {name!r}")
        REGISTRY[name] = cls
        return cls

    return add


def check_output(name: str, output, takes: int) -> Scored:
    """Validates what a scorer returned. Returns (scores float32 [K], parts). Raises `RewardError`."""
    parts: dict[str, np.ndarray] = {}
    if isinstance(output, dict):
        if "score" not in output:
            raise RewardError(f"reward {name}: returned a dict without the key 'score' (keys: {sorted(output)})")
        parts = {k: np.asarray(v, dtype=np.float32) for k, v in output.items() if k != "score"}
        output = output["score"]
    try:
        scores = np.asarray(output, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {name}: returned {type(output).__name__}, which is not numbers: {error}") from error
    if scores.shape != (takes,):
        raise RewardError(
            f"reward {name}: returned shape {list(scores.shape)} for {takes} takes; expected [{takes}], a number each"
        )
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).sum())
        raise RewardError(
            f"reward {name}: returned NaN or infinity for {bad} of {takes} pictures or clips; return a finite number "
            "or raise"
        )
    for key, part in parts.items():
        if part.shape != (takes,):
            raise RewardError(f"reward {name}: part {key!r} has shape {list(part.shape)}, expected [{takes}]")
    return scores, parts
