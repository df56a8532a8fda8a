"""Checkpoints that cannot be a starting point are refused with what to do instead, from their files alone."""

from __future__ import annotations

import json

import pytest
from fake_checkpoint import make_checkpoint

from pipeline.core.errors import InputError
from pipeline.generators.checkpoint_files import check_diffusers_folder


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("model.gguf", "GGUF weights are quantised"),
        ("model.safetensors", "make a diffusers folder of it once"),
        ("model.ckpt", "loading them runs code"),
    ],
)
def test_single_files(tmp_path, name, fix):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=fix):
        check_diffusers_folder(tmp_path / name)


def test_weights_that_were_saved_quantised(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    check_diffusers_folder(folder)
    file = folder / "transformer/config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(InputError, match="are quantised .'bitsandbytes'.; give the original"):
        check_diffusers_folder(folder)
