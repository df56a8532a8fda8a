"""`rushes init`: a config that loads, whose sizes fit, and that replaces nothing."""

from __future__ import annotations

import sys

import pytest
import yaml
from command import run as rushes

from pipeline.config.load import load_config
from pipeline.core.errors import RushesError
from pipeline.tools.memory import estimate

FLAGS = ["-r", "jpeg_compressibility", "--height", "16", "--width", "16"]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    return tmp_path


def init(capsys, place, pretrained, *more):
    return rushes(
        capsys, "init", place / "my.yaml", "--pretrained", pretrained, "--prompts", place / "prompts.txt", *FLAGS, *more
    )


def test_the_config_loads_and_is_never_replaced(place, tiny_sd3, capsys):
    status, out, err = init(capsys, place, tiny_sd3, "--gpu-memory", "24")
    assert status == 0, err
    assert "sizes fit the card by estimate" in out and "next: rushes train" in out
    text = (place / "my.yaml").read_text()
    cfg = load_config(place / "my.yaml")
    assert cfg.generator.pretrained == str(tiny_sd3) and cfg.step.takes == 16 and cfg.learner.resources["GPU"] == 0.5
    assert text.startswith("# yaml-language-server: $schema=") and text.count("#") > 10
    status, _, err = init(capsys, place, tiny_sd3, "--gpu-memory", "24")
    assert status == 2 and "replaces nothing" in err and (place / "my.yaml").read_text() == text


def test_sizes_are_the_largest_that_fit(place, tiny_sd3, capsys, monkeypatch):
    asked = []

    def estimate_memory(cfg, bases):  # 1 GiB for each take in a batch of the learner
        asked.append(cfg.learner.micro_batch)
        return {"device_bytes": cfg.learner.micro_batch * 2**30, "host_bytes": 2**50}

    monkeypatch.setattr(estimate, "estimate_memory", estimate_memory)
    assert init(capsys, place, tiny_sd3, "--gpu-memory", "4")[0] == 0
    cfg = load_config(place / "my.yaml")
    assert asked == [8, 4, 2] and cfg.learner.micro_batch == 2 and cfg.learner.activation_checkpointing
    (place / "my.yaml").unlink()
    status, _, err = init(capsys, place, tiny_sd3, "--gpu-memory", "0.5")
    assert status == 2 and "even the smallest sizes take 1.0 of 0.5 GiB" in err and not (place / "my.yaml").exists()
    status, _, err = init(capsys, place, tiny_sd3, "--gpu-memory", "0")  # the machine's memory counts then
    assert status == 2 and "1048576.0 of" in err


def test_where_the_memory_is_unknown_it_says_so(place, capsys, monkeypatch):
    def estimate_memory(cfg, bases):
        raise RushesError("the configs are not here")

    monkeypatch.setattr(estimate, "estimate_memory", estimate_memory)
    status, out, _ = init(capsys, place, "owner/base", "--gpu-memory", "24")
    assert status == 0 and "not checked against the memory (the configs are not here)" in out
    assert load_config(place / "my.yaml").learner.micro_batch == 1


def test_what_is_missing_is_asked_for(place, tiny_sd3, capsys, monkeypatch):
    status, _, err = rushes(capsys, "init", place / "my.yaml")
    assert status == 2 and "give --pretrained; there is no terminal to ask on" in err
    monkeypatch.setattr(estimate, "estimate_memory", lambda cfg, bases: {"device_bytes": 0, "host_bytes": 0})
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    answers = iter([str(tiny_sd3), "scene", "24", str(place / "prompts.txt")])
    monkeypatch.setattr("typer.prompt", lambda question: next(answers))
    status, _, err = rushes(capsys, "init", place / "my.yaml")
    assert status == 0, err
    assert load_config(place / "my.yaml").rewards["main"].scorer == "scene"


def test_odd_texts_stay_texts(place, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "estimate_memory", lambda cfg, bases: {"device_bytes": 0, "host_bytes": 0})
    status, _, err = init(capsys, place, 'a/b"} #: x', "--gpu-memory", "24")
    assert status == 0, err
    assert yaml.safe_load((place / "my.yaml").read_text())["generator"]["pretrained"] == 'a/b"} #: x'
