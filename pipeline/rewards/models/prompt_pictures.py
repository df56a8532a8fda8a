"""Pictures that come with a prompt: references, conditions, sources of an edit.

A prompts file names them in its rows (`PromptItem.files`, checked when the file is read); what a client of
`rushes serve-reward` writes into metadata is never used as a path.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.core.errors import InputError, RewardError
from pipeline.core.pictures import as_rgb, open_picture
from pipeline.core.types import PromptItem


def references(prompt: PromptItem) -> list[str]:
    """Paths of the prompt's reference pictures. Raises `RewardError` if there is none."""
    return picture_paths(prompt, "reference", "an image, or `reference` (a path or a list)")


def picture_paths(prompt: PromptItem, key: str, fix: str) -> list[str]:
    """The files that the prompt's row names under `key` of its metadata, else its image. Raises `RewardError`.

    `fix`: what the row needs where it has neither, for the message.
    """
    if key in prompt.files:
        return list(prompt.files[key])
    if key in prompt.metadata:
        raise RewardError(
            f"prompt {prompt.index}: metadata.{key} is {prompt.metadata[key]!r:.80}, which is no picture beside a "
            "prompts file; correct the path there, or send the picture itself as `image`"
        )
    if not prompt.image:
        raise RewardError(f"prompt {prompt.index} has no {key} picture; give its row {fix}")
    return [prompt.image]


def read_picture(path: str) -> np.ndarray:
    """uint8 [H, W, 3]; a transparent picture is laid on white. Raises `RewardError`."""
    try:
        return as_rgb(open_picture(Path(path)))
    except InputError as error:
        raise RewardError(f"the reference picture {path} cannot be read ({error})") from error
