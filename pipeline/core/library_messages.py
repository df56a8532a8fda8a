"""Silences what transformers and diffusers print and nobody can act on: progress bars, and log lines by name."""

from __future__ import annotations

import importlib
import logging
import sys

# Library -> parts of its log lines that are dropped.
MEANINGLESS = {
    # Pictures are prepared by the PIL backend on purpose: it needs no torchvision.
    "transformers": ("requires torchvision (not installed); falling back to",),
}


class _Named(logging.Filter):
    """Lets through what contains none of `parts`."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(part in message for part in self.parts)


def silence_libraries() -> None:
    """Of the two libraries, those that are imported by now. Call it before a model is loaded."""
    for library in ("diffusers", "transformers"):
        if library not in sys.modules:
            continue
        messages = importlib.import_module(f"{library}.utils.logging")
        messages.disable_progress_bar()
        messages.get_logger()  # makes the handler
        for handler in logging.getLogger(library).handlers:
            if not any(isinstance(filter_, _Named) for filter_ in handler.filters):
                handler.addFilter(_Named(MEANINGLESS.get(library, ())))
