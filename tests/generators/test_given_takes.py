"""Takes that a data set gives: encoded by rollout workers with the prompt's conditions, trained on by the learner, and
never held for takes that the policy drew."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from labelled_table import SECTIONS, write_table

from pipeline.config.schema import Config
from pipeline.core.errors import InputError, UnsupportedPolicyError
from pipeline.core.media import read_media
from pipeline.core.types import GroupBatch
from pipeline.generators.latent_codec import LatentCodec
from pipeline.generators.policy import Policy
from pipeline.generators.replay.chain import DenoisingChain
from pipeline.learner.learner import Learner
from pipeline.learner.micro_batch import micro_batch_specs
from pipeline.rl.signals import signal_of
from pipeline.rl.signals.base import labels_of
from pipeline.rl.sources import source_of

CPU = torch.device("cpu")


def probed(cfg: Config) -> Policy:
    policy = Policy.load(cfg, "cpu", threads=1)
    policy.probe(list(source_of(cfg).rows(cfg)[:2]))
    policy.add_adapters()
    return policy


@pytest.fixture(scope="module", params=["sd3", "wan"])
def policy(request, tiny_sd3, tiny_wan, tmp_path_factory) -> Policy:
    folder = {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]
    size, frames = (16, 1) if request.param == "sd3" else (32, 5)
    table = write_table(tmp_path_factory.mktemp("pairs"), size, frames)
    sections = {**SECTIONS, "generator": {"guidance_scale": 3.0}, "optimizer": {"lr": 1e-3}}
    return probed(tiny.config(folder, prompts={"train": table}, **sections))


def works_of(policy: Policy) -> list:
    source = source_of(policy.cfg)
    rows = source.rows(policy.cfg)
    return [source.work(policy.cfg, group, 0, row, policy.grid) for group, row in enumerate(rows)]


def group_of(policy: Policy, work, trajectory) -> GroupBatch:
    (feedback,) = signal_of(policy.cfg).begin(policy.cfg.rewards).step([labels_of(work)]).feedback
    return GroupBatch(trajectory=trajectory, feedback=feedback, prompts=work.prompts)


@torch.no_grad()
def test_the_files_are_the_takes_and_the_conditions_are_the_prompts(policy):
    work = works_of(policy)[1]
    denoised = []
    hook = policy.modules["transformer"].register_forward_hook(lambda *_: denoised.append(1))
    policy.rollout(work)  # the stand-ins have seen the shapes
    denoised.clear()
    media, trajectory, seconds = policy.rollout(work)
    hook.remove()
    clips = [read_media(Path(prompt.clip)) for prompt in work.prompts]
    assert np.array_equal(media.frames, np.concatenate([clip.frames for clip in clips]))
    x0 = torch.cat([LatentCodec(policy.pipe.vae, policy.spec, CPU).encode(clip) for clip in clips])
    chain = DenoisingChain(trajectory, policy.modules, CPU)
    assert torch.allclose(chain.clean(slice(None)), x0, atol=1e-6) and not torch.equal(x0[0], x0[1])
    drawn = DenoisingChain(policy.rollout(replace(work, drawn=True)).trajectory, policy.modules, CPU)
    assert chain.levels == drawn.levels and seconds["denoise"] == 0.0
    for level in range(len(chain.levels)):
        ours, theirs = (each.output(level, x0, [0, 1]) for each in (chain, drawn))
        assert float((ours - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())
    with pytest.raises(RuntimeError, match="not drawn"):
        chain.state(0, [0])


def test_it_learns_what_the_labels_say_and_claims_no_replay(policy):
    works = works_of(policy)
    batch = [group_of(policy, work, policy.rollout(work).trajectory) for work in works]
    learner = Learner(policy.cfg, "cpu")
    first = learner.train_step(batch)
    assert first["dpo_loss"] == pytest.approx(math.log(2)) and first["grad_norm"] > 0
    assert not any("policy/" in name for name in first)
    history = [learner.train_step(batch) for _ in range(3)]
    assert history[-1]["dpo/accuracy"] > 0.9 and history[-1]["dpo_loss"] < math.log(2)
    specs = micro_batch_specs(policy.cfg, batch[0].held)
    assert specs and not any(spec.extra_replay_check for spec in specs)
    drawn = [replace(group, trajectory=policy.rollout(replace(work, drawn=True)).trajectory)
             for group, work in zip(batch, works, strict=True)]  # fmt: skip
    assert Learner(policy.cfg, "cpu").train_step(drawn)["onpolicy/max_abs_gap"] < 1e-5


def test_another_worker_encodes_the_same(policy):
    works = works_of(policy)
    mine = [policy.rollout(work).trajectory.parts[0].final.data for work in works]
    others = [drawn.trajectory.parts[0].final.data for drawn in probed(policy.cfg).rollouts(works[::-1])][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(mine, others, strict=True))


def test_a_file_that_cannot_be_read_fails_its_group_in_one_line(policy, tmp_path):
    work = works_of(policy)[0]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 90)
    for name in ("broken.png", "gone.png"):
        path = str(tmp_path / name)
        with pytest.raises(InputError) as error:
            policy.rollout(replace(work, prompts=(work.prompts[0], replace(work.prompts[1], clip=path))))
        assert path in str(error.value) and "\n" not in str(error.value)


def test_the_vae_is_checked_with_the_first_file_that_can_be_read(policy, tmp_path, caplog):
    table = write_table(tmp_path, *((16, 1) if policy.cfg.generator.num_frames == 1 else (32, 5)))
    first = next(tmp_path.glob("a0.*"))
    first.write_bytes(b"nothing")
    cfg = policy.cfg.model_copy(update={"prompts": policy.cfg.prompts.model_copy(update={"train": table})})
    assert probed(cfg).probed.report["clip_error"] > 3
    assert f"the VAE is checked with another clip: {first}" in caplog.text
    strict = cfg.model_copy(update={"source": cfg.source.model_copy(update={"largest_error": 3.0})})
    with pytest.raises(UnsupportedPolicyError, match=r"differs by [\d.]+ grey levels .* \(source.largest_error\)"):
        probed(strict)
