"""The parameters of a pipeline's `__call__`, from which the rest of call/ decides what to pass."""

from __future__ import annotations

import inspect
from typing import Any

FRAMES = ("num_frames", "video_length", "frames")  # names that pipelines give to the number of frames


def parameters_of(pipe: Any) -> dict[str, inspect.Parameter]:
    """Name -> parameter of the pipeline's `__call__`."""
    return dict(inspect.signature(pipe.__call__).parameters)
