"""A ControlNet in the learner: replayed with gradients for any sample, trained alone, by what ControlNet++ and Ctrl-U
lower."""

from __future__ import annotations

from dataclasses import replace

import families
import numpy as np
import pytest
import tiny
import tiny_rewards
import torch
from diffusers import DDIMScheduler
from PIL import Image

from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import Feedback, GroupBatch
from pipeline.generators.policy import Policy
from pipeline.generators.replay.chain import DenoisingChain
from pipeline.learner.learner import Learner
from pipeline.rl.sources import source_of

NAME = "StableDiffusionControlNet"
SIZE = 16


def write_data(folder) -> None:
    """Three pictures, their captions, and where their edges should be."""
    rng = np.random.default_rng(0)
    lines = []
    for number, text in enumerate(families.TEXTS):
        left = 4 + 2 * number
        picture = np.full((SIZE, SIZE, 3), 40, np.uint8)
        picture[4:12, left:] = rng.integers(150, 256, size=3)
        edges = np.zeros((SIZE, SIZE), np.uint8)
        edges[4:12, left] = 255
        Image.fromarray(picture).save(folder / f"picture-{number}.png")
        Image.fromarray(np.repeat(edges[..., None], 3, 2)).save(folder / f"edges-{number}.png")
        lines.append(f'{{"prompt": "{text}", "clip": "picture-{number}.png", "image": "edges-{number}.png"}}')
    (folder / "data.jsonl").write_text("\n".join(lines))


class Case:
    def __init__(self, root) -> None:
        self.root, self.folder, self.clip = root, families.make(NAME, root), tiny_rewards.clip(root / "clip")
        write_data(root)
        self.cfg = self.config()
        self.policy = Policy.load(self.cfg, "cpu", threads=1)
        self.policy.probe(source_of(self.cfg).rows(self.cfg))
        self.policy.add_adapters()

    def config(self, reward=None, lr=1e-3, **options):
        """`reward`: other than whether the edges are where they should be."""
        objective = {"name": "one_step", "reward_steps": 4, "shape": "hinge", "target": 1.0, **options}
        return families.config(
            NAME,
            self.folder,
            prompts={"train": str(self.root / "data.jsonl")},
            source={"name": "clips", "noise": 0.0, "distinct": True, "largest_error": 255},
            rewards={"r": reward or {"scorer": "condition", "args": {"kind": "edges"}, "gradient": True}},
            sampler={"steps": 10, "kind": "ddim"},
            signal={"name": "none"},
            objective=objective,
            trainable={"modules": "controlnet", "kind": "full"},
            step={"takes": 3, "groups": 1},
            optimizer={"lr": lr},
        )

    def batch(self, cfg, last: int) -> GroupBatch:
        """The first group whose clearest level is this sampler step."""
        source = source_of(cfg)
        row = source.rows(cfg)[0]
        works = (source.work(cfg, group, 0, row, self.policy.grid) for group in range(99))
        work = next(work for work in works if work.sampling.trained_steps[-1] == last)
        trajectory = self.policy.rollout(work).trajectory
        return GroupBatch(trajectory=trajectory, feedback=Feedback(), prompts=work.prompts)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("controlnet"))


def test_its_gradient_is_that_of_the_plain_modules(case):
    """For another sample than the recorded one: the residuals are computed from it, with gradients."""
    cfg = case.config(uncertainty=0.0)
    batch, learner = case.batch(cfg, 7), Learner(cfg, "cpu")
    assert {name.split(".")[0] for name in learner.parameters} == {"controlnet"}
    chain = DenoisingChain(batch.held, learner.modules, torch.device("cpu"))
    takes = [2, 0]
    x = torch.randn(2, *chain.clean([0]).shape[1:], generator=torch.Generator().manual_seed(0))
    out = chain.output(0, x, takes)
    expected = []
    pipe = families.plain(case.folder)
    net, unet = learner.modules["controlnet"], learner.modules["unet"]
    for row, take in enumerate(takes):
        prompt = batch.prompts[take]
        text = torch.cat(list(pipe.encode_prompt(prompt.text, "cpu", 1, True))[::-1])
        picture = torch.from_numpy(np.array(Image.open(prompt.image))).permute(2, 0, 1)[None].float() / 255
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[7]
        both = torch.cat([x[row : row + 1]] * 2)
        down, middle = net(
            both, t, encoder_hidden_states=text, controlnet_cond=picture.repeat(2, 1, 1, 1), return_dict=False
        )
        without, with_text = unet(
            both, t, encoder_hidden_states=text, down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample.chunk(2)  # fmt: skip
        expected.append(without + case.cfg.generator.guidance_scale * (with_text - without))
    expected = torch.cat(expected)
    assert torch.allclose(out, expected, atol=1e-5 * float(expected.detach().abs().max()))
    weights = list(learner.parameters.values())
    mine, theirs = (torch.autograd.grad(each.pow(2).sum(), weights) for each in (out, expected))
    peak = max(float(grad.abs().max()) for grad in theirs)
    assert peak > 0 and all(float((a - b).abs().max()) <= 1e-4 * peak for a, b in zip(mine, theirs, strict=True))


def test_one_step_moves_the_controlnet_alone_and_rollouts_draw_with_it(case):
    cfg = case.config(lr=1e-2)
    batch, learner = case.batch(cfg, 9), Learner(cfg, "cpu")
    held_still = {name: p.clone() for name, p in learner.modules["unet"].named_parameters()}
    work = source_of(cfg).work(cfg, 0, 0, source_of(cfg).rows(cfg)[0])
    drawn = replace(work, drawn=True)
    case.policy.load_weights(learner.weights())
    before = case.policy.rollout(drawn).media.frames
    metrics = learner.train_step([batch])
    assert metrics["grad_norm"] > 0
    assert all(torch.equal(p, held_still[name]) for name, p in learner.modules["unet"].named_parameters())
    assert case.policy.load_weights(learner.weights()) == learner.weights().checksum
    assert not np.array_equal(case.policy.rollout(drawn).media.frames, before)


def test_groups_that_were_drawn_in_one_call_have_its_inputs_apart(case):
    source = source_of(case.cfg)
    row = source.rows(case.cfg)[0]
    sampling = {"trained_steps": (0, 4, 7)}
    works = [source.work(case.cfg, group, 0, row) for group in range(2)]
    works = [
        replace(work, drawn=True, prompts=(row,) * 3, sampling=replace(work.sampling, **sampling)) for work in works
    ]
    for together, work in zip(case.policy.rollouts(works), works, strict=True):
        alone = case.policy.rollout(work)
        mine, theirs = (
            DenoisingChain(drawn.trajectory, case.policy.modules, torch.device("cpu")) for drawn in (together, alone)
        )
        assert all(call.before for step in mine.parts[0].part.steps for call in step.calls)
        x = torch.randn(3, *mine.clean([0]).shape[1:], generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            a, b = mine.output(1, x, [2, 0, 1]), theirs.output(1, x, [2, 0, 1])
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()))


def trained(case, weight: float = 1.0, steps: int = 10, last: int = 8, **options) -> list[dict[str, float]]:
    """Metrics of each step, on one group. `weight`: of a smooth reward."""
    reward = {"scorer": "clip_score", "args": {"model": str(case.clip)}, "gradient": True, "weight": weight}
    cfg = case.config(reward, lr=2e-3, **options)
    learner, batch = Learner(cfg, "cpu"), case.batch(cfg, last)
    return [learner.train_step([batch]) for _ in range(steps)]


WATCHED = 1e-9  # a weight that teaches nothing


def test_controlnetpp_raises_the_reward_where_the_denoising_loss_alone_does_not(case):
    """The direction of the paper's ablation; the denoising loss falls in both."""
    with_it, without = trained(case, 3.0), trained(case, WATCHED)
    assert with_it[-1]["loss"] < with_it[0]["loss"] and with_it[-1]["reward_loss"] < with_it[0]["reward_loss"]
    assert all(each[-1]["denoising"] < each[0]["denoising"] for each in (with_it, without))
    assert with_it[0]["reward/r"] == pytest.approx(without[0]["reward/r"])
    assert with_it[-1]["reward/r"] > without[-1]["reward/r"] + 0.01


def test_ctrl_u_lowers_the_uncertainty_where_the_reward_alone_does_not(case):
    """u has a gradient of its own: two neighbouring levels are judged more alike."""
    scale = 20.0
    with_u, without = trained(case, uncertainty=scale), trained(case, uncertainty=WATCHED)
    apart = [[step["uncertainty"] / each for step in steps] for each, steps in ((scale, with_u), (WATCHED, without))]
    assert apart[0][0] == pytest.approx(apart[1][0], rel=1e-4)
    assert apart[0][-1] < 0.7 * apart[0][0] and apart[0][-1] < 0.8 * apart[1][-1]


def test_a_pipeline_without_one_is_refused(tiny_sd3):
    cfg = tiny.config(tiny_sd3, trainable={"modules": "controlnet", "kind": "full"})
    with pytest.raises(UnsupportedPolicyError, match="trainable.modules: controlnet needs .*; use denoiser"):
        Learner(cfg, "cpu")
    with pytest.raises(UnsupportedPolicyError, match="trainable.modules: controlnet needs a ControlNet.*use denoiser"):
        Policy.load(cfg, "cpu", threads=1)
