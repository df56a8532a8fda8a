"""Messages of transformers and diffusers that nobody can act on are dropped by name; others still appear."""

import os
import subprocess
import sys

import pytest

LOAD = """
import logging
from pathlib import Path
from pipeline.config.load import load_config
from pipeline.generators.load.pipeline import load_pipeline
import torch
load_pipeline(load_config(Path("configs/quickstart-image.yaml"), []).generator, torch.device("cpu"))
logger = logging.getLogger("transformers.image_processing")
logger.warning("`CLIPImageProcessor` requires torchvision (not installed); falling back to `CLIPImageProcessorPil` for")
logger.warning("your prompt was truncated")
"""


@pytest.mark.slow
def test_only_what_is_named_is_dropped():
    done = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["[transformers] your prompt was truncated"]
