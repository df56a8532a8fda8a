"""One denoising step of captioned pictures in the learner: the graph from the weights to loss and reward, what training
on it changes, and that nothing depends on how takes are divided."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import tiny_rewards
import torch

from pipeline.core.media import encode_png
from pipeline.core.types import Feedback, GroupBatch
from pipeline.generators.policy import Policy
from pipeline.learner.learner import Learner
from pipeline.learner.tail import ReplayedTail
from pipeline.rewards.runner import build_reward
from pipeline.rl.sources import source_of


class Case:
    def __init__(self, folder, root) -> None:
        for number, text in enumerate(("a red circle", "b blue square", "c green circle")):
            noise = np.random.default_rng(number).integers(256, size=(16, 16, 3), dtype=np.uint8)
            (root / f"{number}.png").write_bytes(encode_png(noise))
            (root / f"{number}.txt").write_text(text)
        self.folder, self.pictures, self.clip = folder, root, tiny_rewards.clip(root / "clip")
        self.policy = Policy.load(self.config(), "cpu", threads=1)
        self.policy.probe(source_of(self.policy.cfg).rows(self.policy.cfg)[:2])

    def config(self, sections=None, **options):
        cfg = tiny.config(
            self.folder,
            **{
                "generator": {"guidance_scale": 3.0},
                "prompts": {"train": self.pictures},
                "source": {"name": "clips", "noise": 0.0, "distinct": True, "largest_error": 255},
                "objective": {"name": "one_step", **options},
                "signal": {"name": "none"},
                "trainable": {"kind": "full"},
                "rollout": {"batch": 2},
                "step": {"takes": 3, "groups": 1},
                "sampler": {"steps": 6},
                "optimizer": {"lr": 1e-3},
                **(sections or {}),
            },
            rewards={"r": {"scorer": "clip_score", "args": {"model": str(self.clip)}, "gradient": True}},
        )
        return cfg

    def group(self, cfg, group: int = 0) -> GroupBatch:
        source = source_of(cfg)
        work = source.work(cfg, group, 0, source.rows(cfg)[0], self.policy.grid)
        trajectory = self.policy.rollout(work).trajectory
        return GroupBatch(trajectory=trajectory, feedback=Feedback(), prompts=work.prompts)

    def at(self, cfg, *steps: int) -> GroupBatch:
        """The first group that trains these sampler steps."""
        return next(b for g in range(99) if (b := self.group(cfg, g)).held.sampling.trained_steps == steps)


@pytest.fixture(scope="module")
def case(tiny_sd3, tmp_path_factory) -> Case:
    return Case(tiny_sd3, tmp_path_factory.mktemp("pictures"))


def gradients(cfg, *batches: GroupBatch) -> dict[str, torch.Tensor]:
    learner = Learner(cfg, "cpu")
    learner._begin_update(list(batches), last=True)
    learner._accumulate(list(batches))
    return {name: p.grad for name, p in learner.parameters.items() if p.grad is not None}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-4) -> bool:
    peak = max(float(t.abs().max()) for t in b.values())
    return a.keys() == b.keys() and all(float((a[k] - b[k]).abs().max()) < tolerance * peak for k in b)


CTRL_U = {"reward_steps": 5, "uncertainty": 2.0, "shape": "hinge", "target": 1.0}


def test_the_gradient_is_that_of_the_loss_written_down(case):
    """Two neighbouring levels of three pictures, in two parts, whose noise is each take's own."""
    cfg = case.config(**CTRL_U)
    batch = case.at(cfg, 2, 3)
    learner, runner, total = Learner(cfg, "cpu"), build_reward("r", cfg.rewards["r"]), 0.0
    seen = []
    for number, part in enumerate(batch.held.parts):
        replayer = learner.replicas[0].micro_batches(batch.held, number)[0].replayer
        x0 = replayer.clean(slice(None))
        noise = ReplayedTail(batch.held, replayer, slice(None)).noise_of_takes(x0[0], cfg.run.seed)
        seen += list(noise)
        rewards = []
        for j, step in enumerate(part.steps):
            x = (1 - step.sigma) * x0 + step.sigma * noise
            v = replayer.model_output(j, slice(0, len(x0)), x)
            pictures = learner.replicas[0].rewards._vae.decode(x - step.sigma * v)[0] / 2 + 0.5
            prompts = batch.prompts[part.start : part.stop]
            rewards.append(runner.gradient(pictures.clamp(0, 1)[:, None], prompts, 0))
            error = (v - (noise - x0)).pow(2).flatten(1).mean(1)
        u = 2.0 * (rewards[1] - rewards[0]).abs()
        total = total + (error + (-u).exp() * (1.0 - rewards[1]).clamp(min=0) + u).sum()
    assert len({float(each.sum()) for each in seen}) == 3
    (total / 3).backward()
    expected = {name: p.grad for name, p in learner.parameters.items() if p.grad is not None}
    assert expected and same(gradients(cfg, batch), expected)
    alone = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"micro_batch": 1})})
    assert same(gradients(alone, batch), expected)
    metrics = Learner(cfg, "cpu").train_step([batch])
    assert (
        metrics["loss"] == pytest.approx(float(total.detach()) / 3, rel=1e-5) and "onpolicy/max_abs_gap" not in metrics
    )


def test_metrics_are_of_the_takes_that_were_judged(case):
    cfg = case.config(reward_steps=2, sections={"step": {"takes": 3, "groups": 2}})
    noisy, clear = case.at(cfg, 0), case.at(cfg, 5)
    alone = Learner(cfg, "cpu").train_step([clear, clear])
    both = Learner(cfg, "cpu").train_step([noisy, clear])
    neither = Learner(cfg, "cpu").train_step([noisy, noisy])
    assert both["reward/r"] == pytest.approx(alone["reward/r"]) and "reward/r" not in neither
    assert both["reward_loss"] == pytest.approx(alone["reward_loss"] / 2)  # of the loss it is a term, of all takes
    assert both["loss"] == pytest.approx((alone["loss"] + neither["loss"]) / 2, rel=1e-5)


def test_training_lowers_the_denoising_loss_and_raises_the_reward(case):
    def trained(**options):
        cfg = case.config(**options, sections={"optimizer": {"lr": 3e-3}})
        learner = Learner(cfg, "cpu")
        batch = case.at(cfg, 3)
        return [learner.train_step([batch]) for _ in range(8)]

    steps = trained(reward_steps=5, denoising=1.0)
    assert steps[-1]["denoising"] < 0.98 * steps[0]["denoising"] and steps[-1]["loss"] < steps[0]["loss"]
    steps = trained(reward_steps=5, denoising=0.0)
    assert steps[-1]["reward/r"] > steps[0]["reward/r"] + 0.01


def test_contrastive_denoises_every_picture_under_every_caption(case, monkeypatch):
    """The error matrix by hand, over the recorded conditions of single takes; training on it tells captions apart."""
    sections = {
        "rollout": {"batch": 0},
        "objective": {"name": "contrastive", "temperature": 2.0},
        "optimizer": {"lr": 3e-3},
    }
    cfg = case.config(sections=sections)
    cfg = cfg.model_copy(update={"rewards": {"r": cfg.rewards["r"].model_copy(update={"gradient": False})}})
    monkeypatch.setattr(case.policy, "cfg", cfg)  # one call for all takes
    batch = case.at(cfg, 4)
    learner = Learner(cfg, "cpu")
    replayer = learner.replicas[0].micro_batches(batch.held, 0)[0].replayer
    x0, step = replayer.clean(slice(None)), batch.held.parts[0].steps[0]
    noise = ReplayedTail(batch.held, replayer, slice(None)).noise_of_takes(x0[0], cfg.run.seed)[0]
    with torch.no_grad():
        errors = torch.stack([
            torch.stack([
                (replayer.model_output(0, slice(j, j + 1), (1 - step.sigma) * x0[i : i + 1] + step.sigma * noise)
                 - (noise - x0[i])).pow(2).mean() for j in range(3)
            ]) for i in range(3)
        ])  # fmt: skip
    expected = torch.nn.functional.cross_entropy(4.0 * (-errors / 2.0).exp(), torch.arange(3))
    steps = [learner.train_step([batch]) for _ in range(12)]
    assert steps[0]["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert steps[0]["denoising"] == pytest.approx(float(errors.diagonal().mean()), rel=1e-4)
    assert steps[-1]["contrastive"] < steps[0]["contrastive"] - 1e-4
