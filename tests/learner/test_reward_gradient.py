"""Learning through a reward in the learner: the graph from the weights to the scores, on images and clips."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_rewards
import torch

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import Feedback, GroupBatch, PromptItem
from pipeline.generators.latent_codec import LatentCodec
from pipeline.generators.policy import Policy
from pipeline.generators.probe import probe
from pipeline.learner.learner import Learner
from pipeline.learner.tail import ReplayedTail
from pipeline.rewards.runner import build_reward
from pipeline.rl.group_plan import scoring_seed, train_work

PROMPT = PromptItem(index=0, text="a red circle")


class Case:
    """A generator whose takes are judged by a CLIP score with gradients, and drawn in two pipeline calls."""

    def __init__(self, folder: Path, clip: Path, **sections) -> None:
        self.rewards = {"clip": {"scorer": "clip_score", "args": {"model": str(clip)}, "gradient": True}}
        self.folder, self.sections = folder, sections
        self.cfg = self.config()
        self.policy = Policy.load(self.cfg, "cpu", threads=1)
        self.policy.probe([PROMPT])
        self.policy.add_adapters()

    def config(self, **options):
        sections = {
            "generator": {"guidance_scale": 3.0, "fps": 8.0},
            "objective": {"name": "reward_gradient", **options},
            "signal": {"name": "none"},
            "trainable": {"kind": "full"},
            "rollout": {"batch": 2},
            "optimizer": {"lr": 1e-3},
            **self.sections,
        }
        rewards = {**self.rewards, **sections.pop("rewards", {})}
        cfg = tiny.config(self.folder, **sections, rewards=rewards)
        return cfg.model_copy(update={"rewards": {name: cfg.rewards[name] for name in rewards}})

    def group(self, cfg, group: int = 0) -> tuple[GroupBatch, np.ndarray]:
        """A group, and its takes' frames."""
        work = train_work(cfg, group, 0, PROMPT)
        media, trajectory, _ = self.policy.rollout(work)
        return GroupBatch(trajectory=trajectory, feedback=Feedback(), prompts=work.prompts), media

    def gradients(self, cfg, batch: GroupBatch) -> dict[str, torch.Tensor]:
        learner = Learner(cfg, "cpu")
        learner._begin_update([batch], last=True)
        learner._accumulate([batch])
        return {name: p.grad for name, p in learner.parameters.items() if p.grad is not None}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return tiny_rewards.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def image(tiny_sd3, clip) -> Case:
    return Case(tiny_sd3, clip)


@pytest.fixture(scope="module")
def video(tiny_wan, clip) -> Case:
    segments = {"count": 2, "frames": 1, "normalize": False}
    return Case(tiny_wan, clip, rewards={"clip": {
        "scorer": "clip_score", "args": {"model": str(clip)}, "gradient": True, "segments": segments,
    }})  # fmt: skip


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_learner_sees_the_rollouts_takes_and_the_servers_scores(request, kind):
    case = request.getfixturevalue(kind)
    cfg = case.config(tail=2, kl_beta=0.1)
    batch, media = case.group(cfg)
    metrics = Learner(cfg, "cpu").train_step([batch])
    scores = build_reward("clip", cfg.rewards["clip"]).run(media, batch.prompts, scoring_seed(cfg, 0)).values
    assert metrics["reward/clip"] == pytest.approx(scores.mean(), abs=1e-2 * float(abs(scores).max()))
    assert metrics["onpolicy/max_abs_tail_gap"] < 1e-6 and metrics["grad_norm"] > 0
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-10) and metrics["loss"] == -metrics["reward/mean"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-4) -> bool:
    peak = max(float(t.abs().max()) for t in b.values())
    return a.keys() == b.keys() and all(float((a[k] - b[k]).abs().max()) < tolerance * peak for k in b)


def test_step_by_step_is_one_long_graph(image):
    """Recomputed denoiser calls, decoding and scoring against the same chain written down without any of it."""
    cfg = image.config(tail=3)
    batch, _ = image.group(cfg)
    learner, runner = Learner(cfg, "cpu"), build_reward("clip", cfg.rewards["clip"])
    total = 0.0
    for number, part in enumerate(batch.held.parts):
        replayer = learner.replicas[0].micro_batches(batch.held, number)[0].replayer
        chain = ReplayedTail(batch.held, replayer, slice(None)).chain
        x = chain.state(0, slice(None))
        for level in chain.levels:
            v = replayer.model_output(level.index - chain.levels[0].index, slice(0, 2), x)
            x = x + (level.noise.sigma_next - level.noise.sigma) * v
        pictures = learner.replicas[0].rewards._vae.decode(x)[0] / 2 + 0.5
        total = total - runner.gradient(pictures.clamp(0, 1)[:, None], batch.prompts[part.start : part.stop], 0).sum()
    (total / 4).backward()
    expected = {name: p.grad for name, p in learner.parameters.items() if p.grad is not None}
    assert expected and same(image.gradients(cfg, batch), expected)
    assert not same(image.gradients(image.config(tail=3, detach=True), batch), expected, 1e-2)
    smaller = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"micro_batch": 1})})
    assert same(image.gradients(smaller, batch), expected)


def test_a_jump_judges_the_prediction_of_x0(image):
    cfg = image.config(jump=4)
    batch, _ = next(
        (b, m) for g in range(20) for b, m in [image.group(cfg, g)] if b.held.sampling.trained_steps == (1,)
    )
    learner = Learner(cfg, "cpu")
    replayer = learner.replicas[0].micro_batches(batch.held, 0)[0].replayer
    tail = ReplayedTail(batch.held, replayer, slice(None))
    with torch.no_grad():
        finished = tail.finish(jump=True)
        x, sigma = tail.chain.state(0, slice(None)), tail.chain.levels[0].noise.sigma
        assert torch.allclose(finished.clean, x - sigma * replayer.model_output(0, slice(0, 2), x), atol=1e-5)
    metrics = learner.train_step([batch])
    assert metrics["onpolicy/max_abs_tail_gap"] < 1e-6 and metrics["grad_norm"] > 0


def test_a_take_that_was_tampered_with_fails_the_replay_check(image):
    cfg = image.config(tail=2)
    batch, _ = image.group(cfg)
    learner = Learner(cfg, "cpu")
    with torch.no_grad():
        for parameter in learner.parameters.values():
            parameter.mul_(1.05)
    assert learner.train_step([batch])["onpolicy/max_abs_tail_gap"] > 1e-4


def test_weights_are_pulled_to_where_they_began(image):
    free, held = (image.config(tail=1, anchor=anchor) for anchor in (0.0, 200.0))
    batch, _ = image.group(free)
    moved = []
    for cfg in (free, held):
        learner = Learner(cfg, "cpu")
        start = {name: p.detach().clone() for name, p in learner.parameters.items()}
        learner.train_step([batch])
        moved.append({name: p.detach() - start[name] for name, p in learner.parameters.items()})
    name = max(moved[0], key=lambda n: float(moved[0][n].abs().max()))
    assert torch.allclose(moved[1][name], (1 - 1e-3 * 200) * moved[0][name], atol=1e-7) and moved[0][name].any()


def test_steps_raise_the_reward(image):
    cfg = image.config(tail=3)
    learner = Learner(cfg, "cpu")
    rewards = []
    for _ in range(3):
        image.policy.load_weights(learner.weights())
        rewards.append(learner.train_step([image.group(cfg)[0]])["reward/clip"])
    image.policy.load_weights(Learner(cfg, "cpu").weights())
    assert rewards[-1] > rewards[0] + 0.01 and rewards == sorted(rewards)


def test_frames_that_no_reward_looks_at_have_no_gradient(video):
    cfg = video.config(tail=1)
    batch, _ = video.group(cfg)
    learner = Learner(cfg, "cpu")
    rewards, seed = learner.replicas[0].rewards, scoring_seed(cfg, 0)
    replayer = learner.replicas[0].micro_batches(batch.held, 0)[0].replayer
    with torch.no_grad():
        x0 = ReplayedTail(batch.held, replayer, slice(None)).finish(jump=False).clean
        pixels = rewards.pixels(x0, batch.held.spec, seed)
    leaf = pixels.detach().requires_grad_()
    rewards.values(leaf, batch.prompts[:2], seed)["clip"].sum().backward()
    looked_at = {int(i) for i in rewards._runners["clip"].looks_at(5, seed, 8.0)}
    assert len(looked_at) == 2
    assert {i for i in range(5) if leaf.grad[:, i].any()} == looked_at


def test_a_pipeline_whose_pictures_the_vae_alone_does_not_make_is_refused(image, monkeypatch):
    cfg = image.config()
    batch, _ = image.group(cfg)
    blind = replace(batch.held, spec=replace(batch.held.spec, latents=None, picture_note="it adds a watermark"))
    with pytest.raises(
        UnsupportedPolicyError, match="objective.name: reward_gradient needs pictures .* a watermark; use"
    ):
        Learner(cfg, "cpu").train_step([replace(batch, trajectory=blind)])
    monkeypatch.setattr(probe, "find_latent_map", lambda *_: (None, "", "it adds a watermark"))
    with pytest.raises(UnsupportedPolicyError, match="reward_gradient needs pictures .* a watermark; use"):
        Policy(image.policy.pipeline).probe([PROMPT])
    assert (
        LatentCodec(None, batch.held.spec, torch.device("cpu")).why_no_decode
        == "the pipeline has no component called vae"
    )
