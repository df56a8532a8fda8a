"""Text encoders trained by RL: embeddings computed again in the learner, weights, caches, export."""

from __future__ import annotations

import os
import re
from pathlib import Path

import families
import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from pydantic import ValidationError
from scored_groups import group_batch

from pipeline.config.schema import TrainableConfig
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import GroupBatch, GroupWork, PromptItem
from pipeline.generators.call.output import to_floats
from pipeline.generators.export import export_full, export_lora, load_lora
from pipeline.generators.load.pipeline import text_encoders_of
from pipeline.generators.policy import Policy
from pipeline.generators.replay.replayer import Replayer
from pipeline.learner.learner import Learner
from pipeline.learner.micro_batch import ReplayCall
from pipeline.rl.group_plan import ode_sampling, train_work

PROMPT = PromptItem(index=0, text="a red circle")


@pytest.fixture(scope="module", params=["sd3", "wan", "sd15"])
def start(request, tiny_sd3, tiny_wan, tmp_path_factory):
    """(checkpoint folder, a function from config sections to a config)"""
    if request.param != "sd15":
        folder = {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]
        return folder, lambda **sections: tiny.config(folder, **sections)
    folder = families.make("StableDiffusion", tmp_path_factory.mktemp("sd15"))
    return folder, lambda **sections: families.config("StableDiffusion", folder, **sections)


def both_sides(cfg) -> tuple[Policy, Learner]:
    policy = Policy.load(cfg, "cpu", threads=1)
    policy.probe()
    policy.add_adapters()
    learner = Learner(cfg, "cpu")
    assert policy.load_weights(learner.weights()) == learner.weights().checksum
    return policy, learner


def group(policy: Policy, number: int) -> GroupBatch:
    media, trajectory, _ = policy.rollout(train_work(policy.cfg, number, number, PROMPT))
    brightness = media.frames.reshape(len(media.frames), -1).mean(1)
    advantages = brightness - brightness.mean() + np.linspace(-1, 1, len(brightness))
    return group_batch(trajectory, advantages)


def advance(policy: Policy, learner: Learner, steps: range) -> list[dict[str, float]]:
    history = []
    for step in steps:
        history.append(learner.train_step([group(policy, step)]))
        policy.load_weights(learner.weights())
    return history


def test_on_policy_ratio_is_one_and_only_what_is_trained_moves(start):
    folder, make = start
    modules = "both" if folder.name == "sd3" else "text_encoder"
    cfg = make(trainable={"modules": modules}, optimizer={"lr": 1e-2}, generator={"guidance_scale": 3.0})
    policy, learner = both_sides(cfg)
    before = {n: p.clone() for c, m in learner.trained.items() for n, p in m.named_parameters(prefix=c)}
    for metrics in advance(policy, learner, range(3)):
        assert metrics["onpolicy/max_abs_log_ratio"] <= 1e-6
        assert metrics["grad_norm"] > 0
    after = {n: p for c, m in learner.trained.items() for n, p in m.named_parameters(prefix=c)}
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved and all("lora_" in name for name in moved)
    assert {name.split(".")[0] for name in moved} == set(learner.trained)
    assert ("text_encoder" in learner.trained) and (modules == "both") == bool(
        set(learner.modules) & set(learner.trained)
    )


def test_gradients_are_those_of_one_long_graph(start):
    """Replay from detached leaves, and one pass through the encoders at the end: the same gradients."""
    _, make = start
    sections = {"trainable": {"modules": "text_encoder"}, "optimizer": {"max_grad_norm": 1e9}}
    policy, learner = both_sides(make(**sections))
    with torch.no_grad():  # away from lora_B = 0, where lora_A has no gradient
        for name, parameter in learner.parameters.items():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    policy.load_weights(learner.weights())
    batch, found = group(policy, 0), {}
    for size in (0, 1):
        other = Learner(make(**sections, learner={"micro_batch": size}), "cpu")
        other.load_state(*learner.state())
        other.train_step([batch])
        found[size] = {n: p.grad.clone() for n, p in other.parameters.items() if p.grad is not None}

    losses, pairs = [], 0
    trajectory = batch.trajectory
    for part in trajectory.parts:
        replayer = Replayer(part, trajectory.spec, learner.modules, learner.device)
        live = learner.replicas[0].text.override_text(replayer, trajectory.sampling)
        roots = {id(leaf): root for root, leaf in live._roots.values()}
        replayer.overrides = {key: roots[id(leaf)] for key, leaf in live.tensors.items()}
        for j in range(len(part.steps)):
            micro = ReplayCall(replayer, j, slice(0, replayer.total))
            loss = learner.replicas[0].loss(batch, micro, check_replay=False).total
            losses.append(loss.sum())
            pairs += len(loss)
    (sum(losses) / pairs).backward()
    whole = {n: p.grad for n, p in learner.parameters.items() if p.grad is not None}
    assert whole.keys() == found[0].keys() == found[1].keys() and len(whole) > 0
    top = max(float(grad.abs().max()) for grad in whole.values())
    assert top > 0
    for name, grad in whole.items():
        torch.testing.assert_close(found[0][name], grad, rtol=1e-4, atol=1e-5 * top)
        torch.testing.assert_close(found[1][name], grad, rtol=1e-2, atol=1e-3 * top)  # PPO's clip sees rounding


def test_kl_reference_is_the_starting_text_encoder_too(tiny_sd3):
    cfg = tiny.config(
        tiny_sd3, trainable={"modules": "text_encoder"}, objective={"kl_beta": 1e-6}, optimizer={"lr": 1e-2}
    )
    history = advance(*both_sides(cfg), range(3))
    assert history[0]["kl"] == 0.0 and history[2]["kl"] > 0


def test_prompt_caches_follow_the_version(tiny_sd3):
    sections = {"trainable": {"modules": "text_encoder"}, "optimizer": {"lr": 0.1}, "rollout": {"merge_lora": True}}
    policy, learner = both_sides(tiny.config(tiny_sd3, **sections))
    work = GroupWork(
        group=0,
        attempt=1,
        purpose="eval",
        step=0,
        prompts=(PROMPT,) * 2,
        seeds=(5, 6),
        sampling=ode_sampling(policy.cfg, 3),
    )
    before, _, _ = policy.rollout(work)
    for metrics in advance(policy, learner, range(3)):
        assert metrics["onpolicy/max_abs_log_ratio"] < 1e-5
    after, _, _ = policy.rollout(work)
    assert np.abs(after.frames.astype(int) - before.frames).max() >= 1


def test_resume_is_bit_for_bit(tiny_sd3):
    cfg = tiny.config(tiny_sd3, trainable={"modules": "both"}, optimizer={"ema_decay": 0.9})
    straight_policy, straight = both_sides(cfg)
    metrics = advance(straight_policy, straight, range(3))
    policy, half = both_sides(cfg)
    advance(policy, half, range(2))
    resumed = Learner(cfg, "cpu")
    resumed.load_state(*half.state())
    policy.load_weights(resumed.weights())
    assert advance(policy, resumed, range(2, 3)) == metrics[2:]
    assert resumed.weights("ema").checksum == straight.weights("ema").checksum


@pytest.mark.slow
def test_exports_give_the_same_pictures_in_plain_diffusers(start, tmp_path):
    folder, make = start
    cfg = make(trainable={"modules": "both"}, optimizer={"lr": 0.1})
    policy, learner = both_sides(cfg)
    prompts, sampling = (PROMPT,) * 2, ode_sampling(cfg, 3)

    def ours(of: Policy) -> np.ndarray:
        return of.sample(prompts, (5, 6), None, sampling).values

    before = ours(policy)
    advance(policy, learner, range(3))
    after = ours(policy)
    assert np.abs(after - before).max() > 1e-3

    def plain(pipe) -> np.ndarray:
        pipe.scheduler = type(policy.pipe.scheduler).from_config(policy.pipe.scheduler.config)
        kwargs = policy.call_arguments(prompts, sampling)
        return to_floats(pipe(**kwargs, generator=[torch.Generator().manual_seed(s) for s in (5, 6)]), 2)

    pipe = DiffusionPipeline.from_pretrained(folder)
    out = export_lora(cfg, learner.weights(), tmp_path / "lora")
    for line in re.findall(r"^    (pipe\.\w+[.( ].*)$", (out / "README.md").read_text(), re.M):
        exec(
            re.sub(r'"(transformer\w*|unet|text_encoder\w*|\.)"', rf'"{out}/\1"', line),
            {"pipe": pipe, "PeftModel": PeftModel},
        )
    assert np.abs(plain(pipe) - after).max() <= 1e-4
    again = Policy.load(cfg.model_copy(update={"trainable": TrainableConfig()}), "cpu", threads=1)
    load_lora(again.pipe, out)
    assert np.abs(ours(again) - after).max() <= 1e-4
    whole = DiffusionPipeline.from_pretrained(export_full(cfg, learner.weights(), tmp_path / "full"))
    assert np.abs(plain(whole) - after).max() <= 1e-4


def test_an_encoder_that_cuts_gradients_is_refused(tiny_sd3, monkeypatch):
    policy = Policy.load(tiny.config(tiny_sd3, trainable={"modules": "text_encoder"}), "cpu", threads=1)
    cls, own = type(policy.pipe), type(policy.pipe).encode_prompt

    def no_graph(self, *args, **kwargs):
        return tuple(None if part is None else part.detach() for part in own(self, *args, **kwargs))

    monkeypatch.setattr(cls, "encode_prompt", no_graph)
    with pytest.raises(UnsupportedPolicyError, match="no denoiser input carries a gradient"):
        policy.probe()

    def half_a_graph(self, *args, **kwargs):
        first, *rest = own(self, *args, **kwargs)
        return (first, *(None if part is None else part.detach() for part in rest))

    monkeypatch.setattr(cls, "encode_prompt", half_a_graph)
    with pytest.raises(UnsupportedPolicyError, match="pooled_projections depends on the text encoders, but no grad"):
        policy.probe()


def test_full_weights_of_text_encoders_are_refused(tiny_sd3):
    with pytest.raises(ValidationError, match="needs trainable.kind lora"):
        tiny.config(tiny_sd3, trainable={"modules": "both", "kind": "full"})


def test_prompts_travel_only_where_needed(tiny_sd3):
    assert isinstance(tiny_sd3, Path)
    policy = Policy.load(tiny.config(tiny_sd3), "cpu", threads=1)
    policy.probe()
    assert group(policy, 0).trajectory.parts[0].call_inputs is None


SOME = ("StableDiffusionControlNet", "ZImage", "HunyuanDiT")  # inputs of a ControlNet; positional lists; two encoders
ALL = os.environ.get("RUSHES_ALL_FAMILIES") == "1"


@pytest.mark.parametrize("name", list(families.FAMILIES) if ALL else SOME)
def test_any_family_can_train_its_text_encoders_and_store_its_embeddings(name, tmp_path):
    folder = families.make(name, tmp_path)
    prompts = families.prompts(name, folder)
    cfg = families.config(name, folder, trainable={"modules": "text_encoder"}, optimizer={"lr": 1e-2})
    if name == "DiT":  # class labels, no text
        with pytest.raises(UnsupportedPolicyError, match="has none"):
            Policy.load(cfg, "cpu", threads=1)
        return
    policy, learner = Policy.load(cfg, "cpu", threads=1), Learner(cfg, "cpu")
    assert policy.probe(prompts)["text_inputs"]
    policy.add_adapters()
    for step in range(2):
        policy.load_weights(learner.weights())
        _, trajectory, _ = policy.rollout(train_work(cfg, step, step, prompts[0]))
        metrics = learner.train_step([group_batch(trajectory, [1, -1])])
        assert metrics["onpolicy/max_abs_log_ratio"] <= 1e-6 and metrics["grad_norm"] > 0

    cfg = families.config(name, folder)
    cfg = cfg.model_copy(update={"generator": cfg.generator.model_copy(update={"embedding_cache": tmp_path / "cache"})})
    for _ in range(2):
        policy = Policy.load(cfg, "cpu", threads=1)
        policy.probe(prompts)
    assert policy.embeddings.misses == 0
    if name == "StableDiffusionInstructPix2Pix":
        assert "besides encode_prompt" in policy.embeddings.settled()["reason"]
    else:
        assert not text_encoders_of(policy.pipe)
