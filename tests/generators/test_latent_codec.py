"""Samples to pictures and back, by the map from samples to latents that is found by value."""

from __future__ import annotations

from dataclasses import replace

import families
import numpy as np
import pytest
import tiny
import torch

from pipeline.config.schema import Config
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import Media, PromptItem
from pipeline.generators.call.output import to_uint8
from pipeline.generators.latent_codec import LatentCodec, PipelineTail
from pipeline.generators.policy import Policy
from pipeline.generators.probe.latent_map import DecoderCall, Tail, find_latent_map
from pipeline.rl.group_plan import ode_sampling

PROMPTS = [PromptItem(index=i, text=text) for i, text in enumerate(("a red circle", "b blue square"))]
CPU = torch.device("cpu")
SHAPE = torch.Size((2, 3, 4))
STD = torch.tensor([0.5, 2.0, 3.0])[:, None]

# The sample [2, 3, 4] -> what the VAE decodes, in one call or several.
TAILS = {
    "scaled": lambda x: [x / 0.18215],
    "statistics per channel": lambda x: [x * STD + torch.tensor([0.1, -0.2, 0.3])[:, None]],
    "permuted": lambda x: [x.transpose(1, 2) * 2 + 1],
    "frames, in pieces": lambda x: list((x.flatten(0, 1)[:, None] * 3).split(4)),
    "16 bits": lambda x: [(x * 0.5 + 0.25).bfloat16()],
}


def tail_of(pack):
    def run(x: torch.Tensor) -> Tail:
        latents = pack(x)
        return Tail(
            [DecoderCall(z, torch.zeros(z.shape[0], 3, 2, 2), {}) for z in latents], np.full((2, 1, 2, 2, 3), 0.5)
        )

    return run


@pytest.mark.parametrize("name", TAILS)
def test_what_the_vae_decodes_is_found_and_inverted(name):
    pack = TAILS[name]
    dtype = torch.bfloat16 if name == "16 bits" else torch.float32
    found, note, _ = find_latent_map(tail_of(pack), SHAPE, dtype)
    assert found is not None and not note and found.whole and found.invertible
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    latents = found.latents(x)
    expected = torch.cat(pack(x)).float().reshape(latents.shape)
    bound = 2e-2 if name == "16 bits" else 1e-5
    assert float((latents - expected).abs().max()) <= bound * float(expected.abs().max())
    assert float((found.sample(latents) - x.float()).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("pack", "reason"),
    [
        (lambda x: [x.tanh()], "otherwise than by scale and shift"),
        (lambda x: [x + x.mean()], "otherwise than by scale and shift"),
        (lambda x: [x.flip(0)], "otherwise than by scale and shift"),  # of another take
        (lambda x: [torch.ones(2, 3)], "does not depend on the last step"),
        (lambda x: [x[:1], x[1:, :2]], "one after another"),
        (lambda x: [], "not decoded by a VAE"),
    ],
)
def test_what_is_no_scale_and_shift_is_told(pack, reason):
    found, note, why_no_pictures = find_latent_map(tail_of(pack), SHAPE, torch.float32)
    assert found is None and reason in note and note == why_no_pictures


def test_a_condition_among_the_latents_is_left_out():
    found, _, _ = find_latent_map(tail_of(lambda x: [torch.cat([torch.ones(2, 1, 4), x], 1)]), SHAPE, torch.float32)
    assert found is not None and not found.whole and found.invertible
    with pytest.raises(ValueError, match="not known from it alone"):
        found.latents(torch.zeros(SHAPE))
    pinned, _, _ = find_latent_map(tail_of(lambda x: [x[:, 1:]]), SHAPE, torch.float32)
    assert pinned is not None and pinned.whole and not pinned.invertible
    with pytest.raises(ValueError, match="do not decide the sample"):
        pinned.sample(torch.zeros(2, 1, 2, 4))


@pytest.fixture(scope="module", params=["sd3", "wan"])
def policy(request, tiny_sd3, tiny_wan) -> Policy:
    folder = {"sd3": tiny_sd3, "wan": tiny_wan}[request.param]
    policy = Policy.load(tiny.config(folder), "cpu", threads=1)
    policy.probe(PROMPTS)
    return policy


@pytest.fixture(scope="module")
def codec(policy) -> LatentCodec:
    """As the learner has it: the VAE alone."""
    codec = LatentCodec.load(policy.cfg.generator, policy.spec, CPU)
    assert not codec.why_no_decode and not codec.why_no_encode
    return codec


@pytest.fixture(scope="module")
def finished(policy) -> tuple[np.ndarray, torch.Tensor]:
    """(pictures float32 [2, F, H, W, 3], x0)."""
    values, recording = policy.sample(PROMPTS, (5, 6), None, ode_sampling(policy.cfg, 3))
    return values, recording.final


def channels_last(pictures: torch.Tensor) -> np.ndarray:
    return pictures.detach().permute(0, 1, 3, 4, 2).numpy()


@torch.no_grad()
def test_the_vae_alone_gives_the_pipelines_pictures(codec, finished):
    values, x0 = finished
    decoded = channels_last(codec.decode(x0))
    assert float(np.abs(decoded - values).max()) < 1e-5
    off = np.abs(to_uint8(decoded).astype(int) - to_uint8(values))
    assert off.max() <= 1 and (off > 0).mean() < 1e-3  # 1e-7 apart at a half
    last = decoded.shape[1] - 1
    assert np.array_equal(channels_last(codec.decode(x0, frames=[last])), decoded[:, [last]])


def test_gradients_are_those_of_the_pipelines_own_tail(policy, codec, finished):
    tail = PipelineTail(policy.pipeline, policy.plan)
    gradients, pictures = [], []
    for decode in (codec.decode, lambda x0: tail.pictures(x0, PROMPTS, (5, 6))):
        x0 = finished[1].clone().requires_grad_(True)
        made = decode(x0)
        weights = torch.linspace(-1, 1, made.numel()).reshape(made.shape)
        (made * weights).sum().backward()
        pictures.append(made.detach())
        gradients.append(x0.grad)
    assert torch.allclose(pictures[0], pictures[1], atol=1e-5)
    assert float(gradients[1].abs().max()) > 0
    assert torch.allclose(gradients[0], gradients[1], atol=1e-4 * float(gradients[1].abs().max()))


def test_media_are_encoded_into_samples(codec, finished):
    values, x0 = finished
    samples = codec.encode(Media(frames=to_uint8(values), fps=8.0))
    assert samples.shape == x0.shape and samples.dtype == torch.float32
    smaller = Media(frames=to_uint8(values)[:, :, :8], fps=8.0)
    with pytest.raises(UnsupportedPolicyError, match="encode to .* the latents of a take are"):
        codec.encode(smaller)


def test_what_cannot_be_had_is_refused_in_one_line(policy, codec, finished):
    x0 = finished[1]
    blind = LatentCodec(codec.vae, replace(policy.spec, latents=None, latents_note="x", picture_note="y"), CPU)
    with pytest.raises(UnsupportedPolicyError, match="Pipeline cannot be decoded by its VAE: y"):
        blind.decode(x0)
    with pytest.raises(UnsupportedPolicyError, match="Pipeline cannot encode pictures: x"):
        blind.encode(Media(frames=np.zeros((1, 1, 16, 16, 3), np.uint8), fps=8.0))
    with pytest.raises(UnsupportedPolicyError, match="no component called vae"):
        LatentCodec(None, replace(policy.spec, picture_note=""), CPU).decode(x0)
    with_tail = LatentCodec(codec.vae, blind.spec, CPU, PipelineTail(policy.pipeline, policy.plan))
    with torch.no_grad():
        assert torch.allclose(with_tail.decode(x0, prompts=PROMPTS), codec.decode(x0), atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_a_vae_that_decodes_frame_by_frame_decodes_only_those_that_are_wanted(tmp_path):
    name = "TextToVideoSD"
    folder = families.make(name, tmp_path)
    policy = families.policy(name, folder)
    prompts = families.prompts(name, folder)
    policy.probe(prompts)
    codec = LatentCodec(policy.pipe.vae, policy.spec, CPU)
    x0 = policy.sample(prompts[:2], (5, 6), None, ode_sampling(policy.cfg, 3)).recording.final
    whole = codec.decode(x0)
    rows = []
    decode = codec.vae.decode
    codec.vae.decode = lambda z, **kwargs: (rows.append(z.shape[0]), decode(z, **kwargs))[1]
    assert torch.allclose(codec.decode(x0, frames=[2, 0]), whole[:, [2, 0]], atol=1e-5) and rows == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["shapes-image", "shapes-video"])
@torch.no_grad()
def test_pictures_of_the_shipped_generators_survive_encoding(model):
    """The VAEs are trained ones, and lose a little: 1.9 and 2.3 grey levels on average were measured."""
    video = model.endswith("video")
    generator = {
        "pretrained": f"models/{model}",
        "height": 48,
        "width": 48,
        "num_frames": 9 if video else 1,
        "call_kwargs": {"max_sequence_length": 12},
    }
    cfg = Config.model_validate({"generator": generator, "prompts": {"train": "x"}, "rewards": {"r": {"scorer": "x"}}})
    policy = Policy.load(cfg, "cpu", threads=1)
    prompt = PromptItem(index=0, text="a red circle moving left slowly" if video else "two green triangles")
    policy.probe([prompt])
    values, _ = policy.sample([prompt], (5,), None, ode_sampling(cfg, 8))
    codec = LatentCodec(policy.pipe.vae, policy.spec, CPU)
    again = channels_last(codec.decode(codec.encode(Media(frames=to_uint8(values), fps=8.0))))
    assert float(np.abs(again - values).mean()) * 255 < 4.0 and float(np.ptp(values)) > 0.5
