"""A reward fitted to people's judgements by `rushes fit-reward`: a linear head on a CLIP's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.messages import show
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import Scorer, register
from pipeline.rewards.models.clip import ClipEmbedder
from pipeline.rewards.models.fitted_head import FittedHead, features, load_head
from pipeline.rewards.models.images import Frames

if TYPE_CHECKING:
    import torch

SAME_BASE = 0.99  # least cosine of the probes; bfloat16 leaves more than 0.999


@register("fitted_clip")
class FittedClip(Scorer):
    """What the people prefer whose labels it was fitted to: a difference of 1 means odds of e to 1."""

    reads = "frame"
    needs_prompt = True
    tested_with = "the shipped CLIP"
    gradient_note = ""

    def __init__(
        self,
        path: str,
        user: str | None = None,
        model: str | None = None,
        digest: str | None = None,
        long_prompts: str = "cut",
        device: str = "auto",
        dtype: str = "float32",
        batch: int = 32,
    ) -> None:
        """`path`: the folder. `user`: a rater that it tells apart; None: the mean over them. `model`: where its CLIP is
        now, if not where it was. `digest`: what `rushes fit-reward` printed, to pin the version."""
        head = _checked(path, user, digest)
        base = model or head.config.base
        self.clip = ClipEmbedder(base, long_prompts=long_prompts, device=device, dtype=dtype, batch=batch)
        check_base(self.clip, head, base)
        self.weights = head.weights(user).to(self.clip.device)

    @classmethod
    def check_args(cls, args: dict[str, Any]) -> None:
        for name in ("path", "user", "model", "digest"):
            value = args.get(name)
            if not isinstance(value, str) and not (value is None and name != "path"):
                raise ConfigError(f"args.{name}: found {show(value)}; expected text")
        _checked(args["path"], args.get("user"), args.get("digest"))

    def score(self, media: Media, prompts: Sequence[PromptItem]) -> dict[str, np.ndarray]:
        scores, cut = self._scores(media.frames[:, 0], prompts)
        return {"score": scores.cpu().numpy(), "cut_tokens": cut}

    def score_pixels(self, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
        return self._scores(pixels[:, 0], prompts)[0]

    def _scores(self, frames: Frames, prompts: Sequence[PromptItem]) -> tuple[torch.Tensor, np.ndarray]:
        texts, cut = self.clip.texts([prompt.text for prompt in prompts])
        return features(self.clip.images(frames), texts) @ self.weights, cut


def probe(clip: ClipEmbedder) -> torch.Tensor:
    """float32 [2, D]: the embeddings of a picture and a text that never change, by which a CLIP is known again."""
    import torch

    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(128)), axis=-1)[None]
    with torch.no_grad():
        return torch.cat([clip.images(picture), clip.texts(["a red circle"])[0]]).cpu()


def _checked(path: str, user: str | None, digest: str | None) -> FittedHead:
    """Raises `ConfigError`."""
    try:
        head = load_head(Path(path))
    except InputError as error:
        raise ConfigError(f"args.path: {error}") from None
    if digest is not None and digest != head.digest:
        raise ConfigError(f"args.digest: found {digest!r:.40}, but {path} has {head.digest}: another version")
    try:
        head.weights(user)
    except InputError as error:
        raise ConfigError(f"args.user: {error}") from None
    return head


def check_base(clip: ClipEmbedder, head: FittedHead, base: str) -> None:
    """Raises `InputError` unless the head was fitted on this CLIP's embeddings."""
    if clip.width != head.config.width:
        raise InputError(f"{base}: embeddings of width {clip.width}, and the head was fitted on {head.config.width}; "
                         "set args.model to the CLIP that it was fitted on")  # fmt: skip
    cosine = float((probe(clip) * head.probe).sum(dim=-1).min())
    if not cosine >= SAME_BASE:
        raise InputError(f"{base}: is not the CLIP that the head was fitted on (a fixed picture and text have other "
                         f"embeddings, cosine {cosine:.3f}); set args.model to that one")  # fmt: skip
