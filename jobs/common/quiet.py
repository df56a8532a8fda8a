"""Keeps what other libraries print, and users cannot act on, off the terminal."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Keeps loading bars and advice of transformers and diffusers off the terminal; call before they are imported."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
