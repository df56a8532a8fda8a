"""Prompt embeddings on disk: the same takes without text encoders, keys, and what cannot be stored."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import families
import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError

from pipeline.core.types import PromptItem
from pipeline.generators.load.embedding_cache import EmbeddingStore, model_key
from pipeline.generators.load.prompt_cache import cache_prompts, forget_prompts
from pipeline.generators.policy import Policy
from pipeline.rl.group_plan import train_work

RED, BLUE = (PromptItem(index=i, text=text) for i, text in enumerate(("a red circle", "b blue square")))


def load(folder: Path, cache: Path | None, **sections) -> Policy:
    generator = {"embedding_cache": str(cache) if cache else None, **sections.pop("generator", {})}
    policy = Policy.load(tiny.config(folder, generator=generator, **sections), "cpu", threads=1)
    policy.probe()
    return policy


def takes(policy: Policy, prompt: PromptItem) -> np.ndarray:
    return policy.rollout(train_work(policy.cfg, 0, 0, prompt))[0].frames


@pytest.fixture(scope="module", params=["sd3", "wan"])
def folder(request, tiny_sd3, tiny_wan):
    return {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]


def test_the_second_run_needs_no_text_encoder(folder, tmp_path):
    plain, first = load(folder, None), load(folder, tmp_path)
    assert first.pipe.text_encoder is not None
    assert np.array_equal(takes(plain, RED), takes(first, RED))
    second = load(folder, tmp_path)
    assert all(second.pipe.components[n] is None for n in second.pipe.components if n.startswith("text_encoder"))
    assert np.array_equal(takes(second, RED), takes(plain, RED))
    assert second.embeddings.misses == 0 and second.pipe.text_encoder is None
    # a prompt that is not there brings the encoders back
    assert np.array_equal(takes(second, BLUE), takes(plain, BLUE))
    assert second.embeddings.misses == 1 and second.pipe.text_encoder is not None
    third = load(folder, tmp_path)
    assert np.array_equal(takes(third, BLUE), takes(plain, BLUE)) and third.pipe.text_encoder is None


def test_a_groups_prompt_is_stored_once(tiny_sd3, tmp_path):
    policy = load(tiny_sd3, tmp_path, generator={"guidance_scale": 1.0})
    before = {path: path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    takes(policy, RED)  # 4 takes of one prompt; the probe has 3 prompts
    (new,) = set(tmp_path.rglob("*.safetensors")) - set(before)
    assert new.stat().st_size < 0.6 * max(before.values())


def test_another_model_has_other_embeddings(tiny_sd3, tmp_path):
    cfg = tiny.config(tiny_sd3).generator
    key = model_key(cfg, torch.float32)
    assert key == model_key(cfg, torch.float32) != model_key(cfg, torch.bfloat16)
    other = tiny.config(tiny.sd3(tmp_path / "other", seed=1)).generator
    assert model_key(other, torch.float32) != key
    file = tmp_path / "other" / "tokenizer" / "tokenizer_config.json"
    before = model_key(other, torch.float32)
    file.write_text(file.read_text().replace('"model_max_length": 8', '"model_max_length": 7'))
    assert model_key(other, torch.float32) != before


def test_a_broken_file_is_encoded_again(tiny_sd3, tmp_path, caplog):
    first = load(tiny_sd3, tmp_path)
    frames = takes(first, RED)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        second = load(tiny_sd3, tmp_path)
    assert np.array_equal(takes(second, RED), frames)
    assert "encoding again" in caplog.text


def test_a_pipeline_that_needs_its_encoders_keeps_them(tiny_sd3, tmp_path, monkeypatch, caplog):
    cls = type(load(tiny_sd3, None).pipe)
    own = cls.prepare_latents

    def needy(self, *args, **kwargs):
        assert self.text_encoder.dtype == torch.float32
        return own(self, *args, **kwargs)

    monkeypatch.setattr(cls, "prepare_latents", needy)
    with caplog.at_level(logging.INFO):
        load(tiny_sd3, tmp_path)
    assert "always loaded" in caplog.text
    assert load(tiny_sd3, tmp_path).pipe.text_encoder is not None
    (note,) = tmp_path.rglob("model.json")
    assert "besides encode_prompt" in json.loads(note.read_text())["reason"]


def test_pictures_among_the_arguments_are_told_apart(tmp_path):
    """Image-to-video pipelines that encode the first frame with the prompt."""
    name = "HunyuanVideoImageToVideo"
    folder = families.make(name, tmp_path)
    cfg = families.config(name, folder)
    cfg = cfg.model_copy(update={"generator": cfg.generator.model_copy(update={"embedding_cache": tmp_path / "cache"})})
    for misses in (True, False):
        policy = Policy.load(cfg, "cpu", threads=1)
        policy.probe(families.prompts(name, folder))
        assert (policy.embeddings.misses > 0) == misses and (policy.pipe.text_encoder is not None) == misses


def test_not_with_trained_text_encoders(tiny_sd3, tmp_path):
    with pytest.raises(ValidationError, match="embeddings change with every version"):
        tiny.config(tiny_sd3, generator={"embedding_cache": str(tmp_path)}, trainable={"modules": "both"})


def test_a_folder_that_cannot_be_written_is_one_clear_error(tiny_sd3, tmp_path):
    from pipeline.core.errors import InputError

    (tmp_path / "file").write_text("")
    cfg = tiny.config(tiny_sd3, generator={"embedding_cache": str(tmp_path / "file")}).generator
    with pytest.raises(InputError, match="generator.embedding_cache: cannot write"):
        EmbeddingStore(cfg, torch.device("cpu"))


def test_what_is_remembered_in_memory_is_bounded_by_its_size():
    encoded = []

    class Pipe:
        def encode_prompt(self, prompt, size=1):
            encoded.append(prompt)
            return torch.full((size, 256), 1.0), None  # 1 KiB for each

    pipe = Pipe()
    cache_prompts(pipe, max_bytes=2048)
    for prompt in "abacab":  # b goes when c comes, c when b comes again
        pipe.encode_prompt(prompt)[0].zero_()  # a copy: what is remembered stays as it is
    assert encoded == ["a", "b", "c", "b"] and bool((pipe.encode_prompt("a")[0] == 1).all())
    pipe.encode_prompt("large", size=3)  # more than all that may be held
    assert pipe.encode_prompt("large", size=3)[0].shape == (3, 256) and encoded[4:] == ["large", "large"]
    pipe.encode_prompt("a")
    forget_prompts(pipe)
    pipe.encode_prompt("a")
    assert encoded[6:] == ["a", "a"]
