"""Likeness to a reference picture against embeddings computed with the libraries' own whole models."""

import numpy as np
import pytest
import tiny_rewards as tiny
import torch
from PIL import Image
from pixel_gradients import check_slope, gap_to_server
from reward_math import centred, cosine, normalised, pil, run, whole_clip
from transformers import ViTModel

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import RewardError
from pipeline.core.types import PromptItem
from pipeline.rewards.runner import build_reward


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    for i in range(2):
        Image.fromarray(tiny.pictures(1, 50, 60, seed=50 + i).frames[0, 0]).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    return folder


def test_clip_i_dino_and_their_harmonic_use(clip, reference, tmp_path):
    media = tiny.pictures(3)
    paths = [str(reference / f"{i}.png") for i in range(2)]
    prompts = [
        PromptItem(index=0, text="a", image=paths[0]),
        PromptItem(index=1, text="b", files={"reference": tuple(paths)}),
        PromptItem(index=2, text="c", image=paths[1], files={"reference": (paths[0],)}),
    ]
    shown = pil(media) + [Image.open(p) for p in paths]
    images, words, _, _ = whole_clip(clip, normalised([centred(p) for p in shown]), ["a", "b", "c", "", ""])
    similar = images[:3] @ images[3:].T
    expected = torch.stack([similar[0, 0], similar[1].mean(), similar[2, 0]]).numpy()
    np.testing.assert_allclose(run("clip_i", media, prompts, model=str(clip)).values, expected, atol=1e-4)

    text = cosine(images[:3], words[:3])
    subject = run("subject", media, prompts, model=str(clip), balance=0.7, floor=0.05)
    harmonic = 1 / (0.7 / expected.clip(0.05) + 0.3 / text.clip(0.05))
    np.testing.assert_allclose(subject.values, harmonic, atol=1e-4)
    np.testing.assert_allclose(subject.parts["text"], text, atol=1e-4)

    folder = tiny.dino(tmp_path)
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    pixels = normalised([centred(p, short=37) for p in shown], **imagenet)  # 32 * 256 / 224 = 36.6
    with torch.no_grad():
        cls = ViTModel.from_pretrained(folder).eval()(pixel_values=pixels).last_hidden_state[:, 0]
    cls = torch.nn.functional.normalize(cls, dim=-1)
    similar = cls[:3] @ cls[3:].T
    expected = torch.stack([similar[0, 0], similar[1].mean(), similar[2, 0]]).numpy()
    np.testing.assert_allclose(run("dino", media, prompts, model=str(folder)).values, expected, atol=1e-4)


def test_a_picture_is_most_like_itself(clip, tmp_path):
    media = tiny.pictures(2)
    Image.fromarray(media.frames[0, 0]).save(tmp_path / "self.png")
    prompts = tiny.items("a", "a", image=str(tmp_path / "self.png"))
    values = run("clip_i", media, prompts, model=str(clip)).values
    assert values[0] == pytest.approx(1.0, abs=1e-5) and values[1] < 0.99


@pytest.mark.parametrize("extra, message", [({}, "no reference picture"), ({"image": "broken.png"}, "cannot be read")])
def test_missing_or_broken_references_are_reward_errors(clip, reference, extra, message):
    extra = {key: str(reference / value) for key, value in extra.items()}
    with pytest.raises(RewardError, match=message):
        run("clip_i", tiny.pictures(1), tiny.items("a", **extra), model=str(clip))


@pytest.mark.parametrize(("scorer", "gap"), [("clip_i", 1e-5), ("subject", 1e-5), ("dino", 5e-3)])
def test_scores_with_gradients_are_the_servers(scorer, gap, clip, reference, tmp_path):
    """DINO's pictures are always resized, by PIL to 8 bits on the server."""
    model = tiny.dino(tmp_path) if scorer == "dino" else clip
    runner = build_reward("r", RewardConfig(scorer=scorer, args={"model": str(model), "batch": 2}))
    paths = tuple(str(reference / f"{i}.png") for i in range(2))
    prompts = tiny.items("a cat", "a mat", "the cat", files={"reference": paths})
    media = tiny.pictures(3, 32, 32)
    assert gap_to_server(runner, media, prompts) < gap
    assert np.ptp(runner.run(media, prompts, None).values) > 20 * gap
    check_slope(runner, media, prompts, eps=0.005)
