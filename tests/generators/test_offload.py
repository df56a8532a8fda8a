"""Where modules lie while others run. There is no accelerator here: what is checked is every move that is asked for,
and that the takes stay the same. The device called cpu:0 stands for the accelerator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from scored_groups import group_batch

from pipeline.core.types import PromptItem
from pipeline.generators.load import offload
from pipeline.generators.load.offload import Offload
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import train_work

RED = PromptItem(index=0, text="a red circle")
FAKE = torch.device("cpu", 0)


@pytest.fixture(scope="module", params=["sd3", "wan"])
def folder(request, tiny_sd3, tiny_wan):
    return {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]


def watched(pipe, log: list[tuple[str, str]], monkeypatch) -> None:
    """Notes where every module is sent, and has the offloading believe it."""
    there = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        own = module.to

        def to(device):
            there[id(module)] = torch.device("meta" if device == FAKE else "cpu")  # any but the CPU
            log.append((name, str(device)))
            return own("cpu")

        module.to = to

    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            watch(name, module)
    monkeypatch.setattr(offload, "device_of", lambda module: there[id(module)])


def offloaded(folder: Path, kind: str, **sections) -> Policy:
    policy = Policy.load(tiny.config(folder, **sections), "cpu", threads=1)
    policy.pipeline.offload = Offload(kind, policy.pipe, policy.modules, FAKE)
    return policy


def takes(policy: Policy) -> np.ndarray:
    return policy.rollout(train_work(policy.cfg, 0, 0, RED))[0].frames


def test_idle_modules_are_away_while_the_denoiser_runs(folder, monkeypatch):
    plain = Policy.load(tiny.config(folder), "cpu", threads=1)
    plain.probe()
    log: list[tuple[str, str]] = []
    policy = Policy.load(tiny.config(folder), "cpu", threads=1)
    watched(policy.pipe, log, monkeypatch)
    policy.pipeline.offload = Offload("idle", policy.pipe, policy.modules, FAKE)
    assert {place for _, place in log} == {"cpu"}  # everything starts there
    policy.probe()
    where = dict.fromkeys(policy.pipe.components, "cpu")
    seen = []

    def look(*_):
        where.update(log)
        seen.append({name for name, place in where.items() if place == "cpu:0"})

    policy.modules["transformer"].register_forward_pre_hook(look)
    log.clear()
    frames = takes(policy)
    assert seen and all(names <= {"transformer"} for names in seen)
    where.update(log)
    assert where["vae"] == "cpu:0"  # decoding came last
    assert [place for name, place in log if name == "text_encoder"] == ["cpu:0", "cpu"]
    assert int(np.abs(frames.astype(int) - takes(plain)).max()) <= 1


def test_the_vae_decodes_in_pieces(folder):
    policy = offloaded(folder, "idle")
    assert policy.pipe.vae.use_slicing and policy.pipe.vae.use_tiling


def test_group_offload_gives_the_same_takes_and_trains(folder):
    sections = {"rollout": {"merge_lora": folder.name == "sd3"}, "optimizer": {"lr": 1e-2}}
    plain = Policy.load(tiny.config(folder, **sections), "cpu", threads=1)
    policy = offloaded(folder, "group", **sections)
    learner = Learner(policy.cfg, "cpu")
    for each in (plain, policy):
        each.probe()
        each.add_adapters()
    for step in range(2):
        for each in (plain, policy):
            assert each.load_weights(learner.weights()) == learner.weights().checksum
        media, trajectory, _ = policy.rollout(train_work(policy.cfg, step, step, RED))
        theirs = plain.rollout(train_work(policy.cfg, step, step, RED))[0].frames
        assert int(np.abs(media.frames.astype(int) - theirs).max()) <= 1  # decoded one by one: other rounding
        batch = [group_batch(trajectory, [1, -1, 1, -1])]
        assert learner.train_step(batch)["onpolicy/max_abs_log_ratio"] < 1e-5


def test_nothing_is_done_without_an_accelerator(tiny_sd3):
    for kind in ("idle", "group"):
        policy = Policy.load(tiny.config(tiny_sd3, generator={"offload": kind}), "cpu", threads=1)
        assert policy.pipeline.offload is None and not policy.pipe.vae.use_tiling
