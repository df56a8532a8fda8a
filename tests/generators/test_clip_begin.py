"""Takes that begin from clips of data: encoded by rollout workers, noised, denoised from there, the same anywhere."""

from __future__ import annotations

from dataclasses import replace

import families
import numpy as np
import pytest
import tiny
import torch

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, InputError, UnsupportedPolicyError
from pipeline.core.media import encode_mp4, encode_png, read_media
from pipeline.core.prompts import load_prompts
from pipeline.core.types import GroupWork, Media
from pipeline.generators.latent_codec import LatentCodec
from pipeline.generators.policy import Policy
from pipeline.generators.replay.chain import DenoisingChain
from pipeline.rl.sources import source_of

CPU = torch.device("cpu")


def write_clips(folder, frames: int, size: int) -> None:
    rng = np.random.default_rng(0)
    for name, text in (("a", "a red circle"), ("b", "b blue square"), ("c", "c green circle")):
        noise = rng.integers(256, size=(frames, size, size, 3), dtype=np.uint8)
        file, data = (".mp4", encode_mp4(noise, 8.0)) if frames > 1 else (".png", encode_png(noise[0]))
        (folder / (name + file)).write_bytes(data)
        (folder / f"{name}.txt").write_text(text)


def config(checkpoint, clips, **sections) -> Config:
    source = {"name": "clips", "noise": 0.85, "largest_error": 255, **sections.pop("source", {})}
    return tiny.config(
        checkpoint, prompts={"train": clips}, source=source, sampler={"steps": 4}, step={"takes": 3}, **sections
    )


def probed(cfg: Config) -> Policy:
    policy = Policy.load(cfg, "cpu", threads=1)
    policy.probe(source_of(cfg).rows(cfg)[:2])
    return policy


def work_of(policy: Policy, row: int = 0, group: int = 0) -> GroupWork:
    source = source_of(policy.cfg)
    return source.work(policy.cfg, group, 0, source.rows(policy.cfg)[row], policy.grid)


@pytest.fixture(scope="module", params=["sd3", "wan"])
def policy(request, tiny_sd3, tiny_wan, tmp_path_factory) -> Policy:
    folder = {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]
    clips = tmp_path_factory.mktemp("clips")
    write_clips(clips, *((1, 16) if request.param == "sd3" else (5, 32)))
    return probed(config(folder, clips))


def noise(seed: int, x0: torch.Tensor, offset: float) -> torch.Tensor:
    """White noise, and 0.1 of a Gaussian per frame and channel: [C, H, W] or [C, F, H, W] here."""
    source = torch.Generator().manual_seed(seed)
    eps = torch.randn(x0.shape, generator=source)
    return eps + offset * torch.randn(*x0.shape[:-2], 1, 1, generator=source)


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_takes_begin_at_the_clip_noised_by_the_closed_form(policy, offset):
    work = work_of(policy, row=1)
    work = replace(work, begin=replace(work.begin, offset_noise=offset))
    media, trajectory, _ = policy.rollout(work)
    chain = DenoisingChain(trajectory, policy.modules, CPU)
    x0 = LatentCodec(policy.pipe.vae, policy.spec, CPU).encode(read_media(work.prompts[0].clip))[0]
    sigma = policy.grid.levels[work.begin.step].sigma
    expected = torch.stack([(1 - sigma) * x0 + sigma * noise(seed, x0, offset) for seed in work.seeds])
    assert chain.levels[0].index == work.begin.step and chain.levels[0].noise.sigma == sigma
    assert torch.allclose(chain.state(0, slice(None)), expected, atol=1e-5)
    assert media.frames.shape == (3, *read_media(work.prompts[0].clip).frames.shape[1:])
    assert len(np.unique(media.frames.reshape(3, -1), axis=0)) == 3


def test_another_worker_and_a_shared_call_draw_the_same_takes(policy):
    works = [work_of(policy, row, group=row) for row in range(2)]
    alone = [policy.rollout(work).media.frames for work in works]
    other = probed(policy.cfg)
    assert np.array_equal(other.rollout(works[1]).media.frames, alone[1])  # before it has seen the first
    assert np.array_equal(other.rollout(works[0]).media.frames, alone[0])
    if policy.plan.mode.batched:
        wide = probed(policy.cfg.model_copy(update={"rollout": policy.cfg.rollout.model_copy(update={"batch": 6})}))
        calls = []
        sample = wide.pipeline.sample
        wide.pipeline.sample = lambda *args: (calls.append(len(args[1])), sample(*args))[1]
        together = [drawn.media.frames for drawn in wide.rollouts(works)]
        assert calls == [6]
        for frames, expected in zip(together, alone, strict=True):
            assert np.abs(frames.astype(int) - expected).max() <= 1  # a batch of another size: equal up to rounding


def test_with_noise_0_the_clips_themselves_are_the_takes(policy):
    """Nothing is denoised: their encodings come with the conditions of their own captions."""
    source = policy.cfg.source.model_copy(update={"noise": 0.0, "distinct": True})
    work = source.work(policy.cfg, 3, 0, source.rows(policy.cfg)[1])
    policy.rollout(work)  # stand-ins have seen every shape
    calls: list[int] = []
    block = next(m for m in policy.modules["transformer"].modules() if "Block" in type(m).__name__)
    hook = block.register_forward_hook(lambda *_: calls.append(1))
    rollout, other = policy.rollouts([work, replace(work, group=4)])
    hook.remove()
    assert not calls
    paths = [prompt.clip for prompt in work.prompts]
    assert len(set(paths)) == 3 and other.trajectory.group == 4
    assert np.array_equal(rollout.media.frames, np.concatenate([read_media(path).frames for path in paths]))
    chain = DenoisingChain(rollout.trajectory, policy.modules, CPU)
    codec = LatentCodec(policy.pipe.vae, policy.spec, CPU)
    x0 = torch.cat([codec.encode(read_media(path)) for path in paths])
    assert torch.allclose(chain.clean(slice(None)), x0.float(), atol=1e-5)
    drawn = policy.rollout(replace(work, drawn=True)).trajectory
    expected = DenoisingChain(drawn, policy.modules, CPU)
    assert [level.index for level in chain.levels] == [level.index for level in expected.levels] == [0, 1, 2]
    x = chain.noised(1, x0, torch.ones_like(x0))
    with torch.no_grad():
        ours, theirs = chain.output(1, x, [2, 0, 1]), expected.output(1, x, [2, 0, 1])
    assert float((ours - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())


def test_a_clip_is_encoded_once_and_again_when_its_file_changes(policy, tmp_path):
    form = policy._clips.data.form
    write_clips(tmp_path, form.frames, form.height)
    first, second = (row.clip for row in load_prompts(tmp_path)[:2])
    encoded, encode = [], policy.pipe.vae.encode
    policy.pipe.vae.encode = lambda *args: (encoded.append(1), encode(*args))[1]
    try:
        policy._clips._kept.clear()
        x0 = policy._clips.encode([first, first, second])
        assert len(encoded) == 2 and torch.equal(x0[0], x0[1]) and not torch.equal(x0[0], x0[2])
        with open(second, "rb") as file:
            data = file.read()
        with open(first, "wb") as file:
            file.write(data)
        assert torch.equal(policy._clips.encode([first])[0], x0[2]) and len(encoded) == 2  # known by its content
    finally:
        del policy.pipe.vae.encode


def test_encodings_that_were_not_used_for_long_are_dropped(policy, monkeypatch):
    from pipeline.generators import clip_encoder

    monkeypatch.setattr(clip_encoder, "KEPT_BYTES", 1)
    paths = [str(row.clip) for row in source_of(policy.cfg).rows(policy.cfg)]
    policy._clips.encode(paths)
    assert len(policy._clips._kept) == 1


def test_a_vae_that_does_not_fit_the_clips_is_refused_at_the_start(policy):
    source = policy.cfg.source.model_copy(update={"largest_error": 3.0})
    cfg = policy.cfg.model_copy(update={"source": source})
    with pytest.raises(UnsupportedPolicyError, match=r"differs by [\d.]+ grey levels .* 3 are allowed") as error:
        probed(cfg)
    assert "source.largest_error" in str(error.value) and "\n" not in str(error.value)
    assert policy.probed.report["clip_error"] > 3


def test_a_clip_that_breaks_while_a_run_goes_on_fails_its_group_in_one_line(policy, tmp_path):
    form = policy._clips.data.form
    write_clips(tmp_path, form.frames, form.height)
    row = load_prompts(tmp_path)[0]
    work = replace(work_of(policy), prompts=(row,) * 3)
    with open(row.clip, "wb") as file:
        file.write(b"\0" * 100)
    for path in (row.clip, str(tmp_path / "gone.mp4")):
        with pytest.raises(InputError) as error:
            policy.rollout(replace(work, prompts=(replace(row, clip=path),) * 3))
        assert path in str(error.value) and "\n" not in str(error.value)


def test_a_level_that_leaves_nothing_of_the_clip_is_refused(policy):
    source = policy.cfg.source.model_copy(update={"noise": 0.999})
    with pytest.raises(ConfigError, match="source.noise: found 0.999"):
        probed(policy.cfg.model_copy(update={"source": source}))


def test_begin_noise_follows_the_layout_of_packed_latents():
    """Flux packs 2 x 2 positions of all channels into a token: a channel's offset is the same in all of them."""
    from pipeline.generators.clip_encoder import begin_noise
    from pipeline.generators.latent_map import LatentMap

    order = (
        np.random.default_rng(0).permutation(2 * 3 * 16).astype(np.int32).reshape(2, 3, 4, 4)
    )  # 2 frames, each alone
    latents = LatentMap(positions=order, scale=np.float32([2.0]), shift=np.float32([5.0]), sample_shape=(24, 4))
    plain, shifted = (begin_noise((24, 4), [7, 8], latents, offset) for offset in (0.0, 0.5))
    levels = ((shifted - plain) / 0.5).flatten(1)[:, torch.from_numpy(order).long()]  # [2, 2, 3, 4, 4]
    spread = levels.flatten(3).std(3)
    assert float(spread.max()) < 1e-5 and len(levels[..., 0, 0].flatten().round(decimals=4).unique()) == 12
    assert torch.equal(begin_noise((24, 4), [8], latents, 0.5)[0], shifted[1])


@pytest.mark.slow
def test_a_model_that_predicts_noise_begins_at_the_diffused_clip(tmp_path):
    """TextToVideoSD, ModelScope's class: frames are separate latents, the grid is DDIM's."""
    name = "TextToVideoSD"
    folder = families.make(name, tmp_path)
    base = families.config(name, folder)
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clips(clips, base.generator.num_frames, base.generator.height)
    cfg = families.config(
        name, folder, prompts={"train": clips}, source={"name": "clips", "largest_error": 255}, sampler={"steps": 5}
    )
    policy = probed(cfg)
    work = work_of(policy)
    assert work.begin.step == 2  # the last 3 of 5
    chain = DenoisingChain(policy.rollout(work).trajectory, policy.modules, CPU)
    clip = read_media(work.prompts[0].clip)
    x0 = LatentCodec(policy.pipe.vae, policy.spec, CPU).encode(Media(frames=clip.frames, fps=8.0))[0]  # [F, C, H, W]
    abar = float(policy.pipe.scheduler.alphas_cumprod[policy.pipe.scheduler.timesteps[2]])
    assert policy.grid.levels[2].sigma == pytest.approx(abar)
    assert x0.shape[0] == base.generator.num_frames
    for take, seed in enumerate(work.seeds):
        expected = abar**0.5 * x0 + (1 - abar) ** 0.5 * noise(seed, x0, 0.1)
        gap = float((chain.state(0, [take])[0] - expected).abs().max())
        assert gap < 1e-5
