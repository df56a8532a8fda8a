"""The learner on tiny real pipelines: on-policy ratio, accumulation, KL, EMA, resume, export."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from scored_groups import group_batch

from pipeline.core.errors import CheckpointError, RunFailed, RushesError
from pipeline.core.types import GroupBatch, GroupWork, PromptItem
from pipeline.generators.export import export_full, export_lora
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.rl.group_plan import ode_sampling, train_work

PROMPT = PromptItem(index=0, text="a red circle")


@pytest.fixture(scope="module", params=["sd3", "wan"])
def folder(request, tiny_sd3, tiny_wan):
    return {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]


def make(folder, **sections) -> tuple[Policy, Learner]:
    cfg = tiny.config(folder, **sections)
    policy = Policy.load(cfg, "cpu", threads=1)
    policy.probe()
    policy.add_adapters()
    learner = Learner(cfg, "cpu")
    assert policy.load_weights(learner.weights()) == learner.weights().checksum
    return policy, learner


def batch(policy: Policy, step: int, *, equal: bool = False) -> list[GroupBatch]:
    made = []
    for i in range(2):
        media, trajectory, _ = policy.rollout(train_work(policy.cfg, step * 2 + i, step, PROMPT))
        brightness = media.frames.reshape(4, -1).mean(1)
        advantages = (brightness - brightness.mean()) / (brightness.std() + 1e-4) * (0 if equal else 1)
        made.append(group_batch(trajectory, advantages))
    return made


def advance(policy: Policy, learner: Learner, steps: range) -> list[dict[str, float]]:
    metrics = []
    for step in steps:
        metrics.append(learner.train_step(batch(policy, step)))
        policy.load_weights(learner.weights())
    return metrics


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_on_policy_ratio_is_one(folder, kind, scale):
    policy, learner = make(folder, trainable={"kind": kind}, generator={"guidance_scale": scale})
    for metrics in advance(policy, learner, range(3)):
        assert metrics["onpolicy/max_abs_log_ratio"] == 0.0
        assert metrics["grad_norm"] > 0
    small = Learner(tiny.config(folder, trainable={"kind": kind}, learner={"micro_batch": 3}), "cpu")
    small.load_state(*learner.state())
    assert 0 <= small.train_step(batch(policy, 3))["onpolicy/max_abs_log_ratio"] < 1e-5


def test_on_policy_ratio_with_merged_lora_is_one_to_rounding(folder):
    policy, learner = make(folder, rollout={"merge_lora": True}, optimizer={"lr": 1e-2})
    for metrics in advance(policy, learner, range(3)):
        assert metrics["onpolicy/max_abs_log_ratio"] < 1e-5


def test_activation_checkpointing_changes_nothing(folder):
    policy, learner = make(folder)
    again = Learner(tiny.config(folder, learner={"activation_checkpointing": True}), "cpu")
    groups = batch(policy, 0)
    plain, recomputed = learner.train_step(groups), again.train_step(groups)
    assert recomputed["onpolicy/max_abs_log_ratio"] == 0.0
    assert recomputed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_equal_rewards_move_nothing(folder):
    policy, learner = make(folder, optimizer={"weight_decay": 0.0})
    before = learner.weights().checksum
    metrics = learner.train_step(batch(policy, 0, equal=True))
    assert metrics["grad_norm"] == 0.0 and learner.weights().checksum == before


def test_micro_batches_accumulate_to_the_same_gradient(folder):
    policy, learner = make(folder)
    groups = batch(policy, 0)
    whole = learner.train_step(groups)["grad_norm"]
    for size in (1, 3):
        other = Learner(tiny.config(folder, learner={"micro_batch": size}), "cpu")
        assert other.train_step(groups)["grad_norm"] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("takes, calls", [(12, 1), (8, 2)])
@pytest.mark.parametrize(
    "recipe",
    [
        {"name": "grpo", "kl_beta": 0.1, "kl_every": 2},
        {"name": "grpo_guard", "kl_beta": 0.1},
        {"name": "flow_dppo"},
    ],
    ids=lambda recipe: recipe["name"],
)
def test_several_trained_steps_in_one_call_give_the_same_gradient(folder, recipe, takes, calls):
    policy, learner = make(folder, objective=recipe, optimizer={"lr": 1e-3})
    advance(policy, learner, range(1))  # the KL is no longer 0
    groups = batch(policy, 1)
    passes, results = {}, {}
    for size in (0, takes):
        other = Learner(tiny.config(folder, objective=recipe, learner={"micro_batch": size}), "cpu")
        other.load_state(*learner.state())
        seen = passes[size] = []
        other.modules["transformer"].register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(1))
        results[size] = other.train_step(groups)
    replayed = len(groups) * (3 - calls)  # fewer calls of the policy; LoRA: the reference calls the same modules
    assert len(passes[0]) - len(passes[takes]) >= replayed > 0
    assert results[takes] == pytest.approx(results[0], rel=1e-4, abs=1e-6)
    assert results[0]["grad_norm"] > 0 and results[0].get("kl", 1.0) > 0
    assert results[takes]["onpolicy/max_abs_log_ratio"] < 1e-5


def test_groups_given_one_by_one_train_as_all_at_once(folder):
    policy, learner = make(folder)
    groups = batch(policy, 0)
    cfg = tiny.config(folder, step={"groups": 2})
    portioned = Learner(cfg, "cpu")
    portioned.load_state(*learner.state())
    assert portioned.train_step(groups[1:], first=0, last=False) == {}  # given up: the step begins again
    assert portioned.train_step(groups[:1], first=0, last=False) == {}
    with pytest.raises(RuntimeError, match="group 0 of the step was given|group 2"):
        portioned.train_step(groups[1:], first=2)
    assert portioned.version == 0
    assert portioned.train_step(groups[1:], first=1, last=True) == learner.train_step(groups)
    assert portioned.version == 1 and portioned.weights().checksum == learner.weights().checksum


def test_off_policy_updates_move_the_ratio_and_clip(folder):
    policy, learner = make(
        folder, objective={"clip_low": 1e-7, "clip_high": 1e-7}, step={"updates": 2}, optimizer={"lr": 1e-2}
    )
    metrics = learner.train_step(batch(policy, 0))
    assert metrics["onpolicy/max_abs_log_ratio"] == 0.0  # measured before the first update
    assert metrics["ratio/max_abs_log"] > 1e-6
    assert metrics["clip/low"] + metrics["clip/high"] > 0


def test_takes_of_an_earlier_version_are_said_to_be_off_policy(folder):
    policy, learner = make(folder, optimizer={"lr": 1e-2})
    first, second = batch(policy, 0), [replace(group, staleness=1) for group in batch(policy, 1)]
    assert learner.train_step(first)["onpolicy/max_abs_log_ratio"] == 0.0
    metrics = learner.train_step(second)
    assert metrics["offpolicy/max_abs_log_ratio"] > 1e-6 and "onpolicy/max_abs_log_ratio" not in metrics
    assert metrics["ratio/max"] == 1.0 and metrics["offpolicy/rms_log_ratio"] > 1e-6
    assert metrics["clip/low"] == metrics["clip/high"] == 0.0


@pytest.mark.parametrize(("stale", "trains"), [("reweigh", True), ("clip", False)])
def test_what_16_bits_round_differently_is_not_clipped_away(folder, stale, trains):
    """Log-ratios of 3e-4 before the update, as bfloat16 gives them, and a clip of 1e-4: the gradient stays the same."""

    def rounded(group: GroupBatch) -> GroupBatch:
        away = 3e-4 * np.sign(group.feedback.advantages)  # to the side where the clip ends the gradient
        parts = [
            replace(part, steps=tuple(replace(step, log_prob=step.log_prob - away) for step in part.steps))
            for part in group.held.parts
        ]
        return replace(group, trajectory=replace(group.held, parts=tuple(parts)))

    policy, _ = make(folder)
    groups = batch(policy, 0)
    results = []
    for given in (groups, [rounded(group) for group in groups]):
        _, learner = make(folder, objective={"clip_low": 1e-4, "clip_high": 1e-4, "stale": stale})
        results.append(learner.train_step(given))
    exact, off = results
    assert exact["clip/high"] == exact["clip/low"] == 0
    if trains:
        assert off["grad_norm"] == pytest.approx(exact["grad_norm"], rel=1e-3) and off["clip/high"] == 0
    else:
        assert off["grad_norm"] == 0 and off["clip/high"] + off["clip/low"] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_kl_to_the_reference_grows_from_zero_and_holds_back(folder, kind):
    policy, learner = make(folder, trainable={"kind": kind}, objective={"kl_beta": 1e-6}, optimizer={"lr": 1e-3})
    history = advance(policy, learner, range(3))
    assert history[0]["kl"] == 0.0 and history[2]["kl"] > 0
    held_policy, held = make(folder, trainable={"kind": kind}, objective={"kl_beta": 100.0}, optimizer={"lr": 1e-3})
    assert advance(held_policy, held, range(3))[2]["kl"] < history[2]["kl"]


def test_the_kl_at_every_nth_step_of_a_group_gives_the_same_update_on_average(folder):
    """Three groups of the same takes, whose trained steps have their turn in one each: a third of the calls."""
    policy, learner = make(folder, objective={"kl_beta": 0.1}, optimizer={"lr": 1e-3})
    advance(policy, learner, range(2))
    one = batch(policy, 2)[0]
    same = [replace(one, trajectory=replace(one.trajectory, group=number)) for number in range(3)]
    results = []
    for every in (1, 3):
        _, other = make(folder, objective={"kl_beta": 0.1, "kl_every": every}, optimizer={"lr": 1e-3})
        other.load_state(*learner.state())
        calls = []
        other.modules["transformer"].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results.append((other.train_step(same), len(calls)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4) and results[0][0]["kl"] > 0
    assert (results[0][1], results[1][1]) == (2 * 3 * 3, 3 * 3 + 3)


@pytest.mark.parametrize("objective", ["grpo_guard", "flow_dppo"])
def test_other_objectives_train(folder, objective):
    policy, learner = make(folder, objective={"name": objective})
    assert advance(policy, learner, range(2))[1]["grad_norm"] > 0


def test_resume_is_bit_for_bit(folder):
    sections = {"optimizer": {"ema_decay": 0.9, "warmup_steps": 3}}
    policy, learner = make(folder, **sections)
    straight = advance(policy, learner, range(4))
    policy2, half = make(folder, **sections)
    advance(policy2, half, range(2))
    tensors, meta = half.state()
    policy3, resumed = make(folder, **sections)
    resumed.load_state(tensors, meta)
    policy3.load_weights(resumed.weights())
    assert advance(policy3, resumed, range(2, 4)) == straight[2:]
    for tag in ("train", "ema"):
        assert resumed.weights(tag).checksum == learner.weights(tag).checksum
    assert learner.weights("ema").checksum != learner.weights("train").checksum


def test_state_of_another_config_is_refused(folder):
    _, learner = make(folder)
    other = Learner(tiny.config(folder, trainable={"kind": "full"}), "cpu")
    with pytest.raises(CheckpointError, match="does not fit"):
        other.load_state(*learner.state())
    full = Policy.load(tiny.config(folder, trainable={"kind": "full"}), "cpu")
    full.add_adapters()
    with pytest.raises(RushesError, match="do not fit"):
        full.load_weights(learner.weights())


def test_lora_training_leaves_the_base_alone(folder):
    policy, learner = make(folder, optimizer={"lr": 1e-2})
    base = {n: p.clone() for n, p in learner.modules["transformer"].named_parameters() if "lora_" not in n}
    advance(policy, learner, range(2))
    for name, parameter in learner.modules["transformer"].named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name]), name


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(folder):
    policy, learner = make(folder)
    groups = batch(policy, 0)
    groups[0].feedback.advantages[0] = np.inf
    before = learner.weights().checksum
    with pytest.raises(RunFailed, match="lower optimizer.lr"):
        learner.train_step(groups)
    assert learner.weights().checksum == before


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_export_gives_the_same_pictures_in_plain_diffusers(folder, kind, tmp_path):
    from diffusers import DiffusionPipeline
    from peft import PeftModel

    policy, learner = make(folder, trainable={"kind": kind}, optimizer={"lr": 3e-2})
    untrained = policy.pipe.transformer
    work = GroupWork(
        group=0,
        attempt=1,
        purpose="eval",
        step=0,
        prompts=(PROMPT,) * 2,
        seeds=(5, 6),
        sampling=ode_sampling(policy.cfg, 4),
    )
    before, _, _ = policy.rollout(work)
    advance(policy, learner, range(2))
    ours, _, _ = policy.rollout(work)
    assert np.abs(ours.frames.astype(int) - before.frames).max() > 1 and untrained is policy.pipe.transformer

    def plain(pipe) -> np.ndarray:
        kwargs = policy.call_arguments(work.prompts, work.sampling)
        output = pipe(**kwargs, generator=[torch.Generator().manual_seed(s) for s in work.seeds])
        values = output.frames if hasattr(output, "frames") else output.images
        return np.rint(np.asarray(values).reshape(ours.frames.shape).clip(0, 1) * 255)

    exported = [DiffusionPipeline.from_pretrained(export_full(policy.cfg, learner.weights(), tmp_path / "full"))]
    if kind == "lora":
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.load_lora_weights(export_lora(policy.cfg, learner.weights(), tmp_path / "lora"))
        exported.append(pipe)
        for_peft = DiffusionPipeline.from_pretrained(folder)
        adapter = PeftModel.from_pretrained(for_peft.transformer, tmp_path / "lora")  # merged in place
        assert adapter.peft_config["default"].base_model_name_or_path == str(folder)
        adapter.merge_and_unload()
        exported.append(for_peft)
    for pipe in exported:
        assert np.abs(plain(pipe) - ours.frames).max() <= 1
