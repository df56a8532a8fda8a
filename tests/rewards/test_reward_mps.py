"""MPS against its forward pass written out one picture at a time, on small random weights; and the usual mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_rewards as tiny
import torch
from PIL import Image
from pixel_gradients import check_slope, gap_to_server
from reward_math import run
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import InputError
from pipeline.rewards.runner import build_reward

DIM, HEADS, HEAD, LAYERS = 24, 3, 8, 2
CONDITION = "light, color, hands"
THRESHOLD = 0.6  # masks about half of the tokens with these weights; the published 0.3 masks hardly any


def cross_weights(seed=0, old_names=False):
    """The cross model's weights under the published names; `old_names`: of a layer norm without bias."""
    rng = torch.Generator().manual_seed(seed)

    def made(*shape):
        return torch.randn(shape, generator=rng) * 0.3

    tensors = {}
    for n in range(LAYERS):
        cross, own = f"cross_model.layers.{n}.0.fn.", f"cross_model.layers.{n}.1.fn."
        for prefix in (cross, own):
            tensors[prefix + ("norm.gamma" if old_names else "norm.weight")] = 1 + made(DIM)
            tensors[prefix + ("norm.beta" if old_names else "norm.bias")] = torch.zeros(DIM)
        tensors[cross + "to_q.weight"] = made(HEADS * HEAD, DIM)
        tensors[cross + "to_kv.weight"] = made(2 * HEAD, DIM)
        tensors[cross + "to_out.weight"] = made(DIM, HEADS * HEAD)
        tensors[cross + "ff.0.weight"] = made(8 * DIM, DIM)
        tensors[cross + "ff.2.weight"] = made(DIM, 4 * DIM)
        tensors[own + "fused_attn_ff_proj.weight"] = made(HEADS * HEAD + 2 * HEAD + 8 * DIM, DIM)
        tensors[own + "attn_out.weight"] = made(DIM, HEADS * HEAD)
        tensors[own + "ff_out.1.weight"] = made(DIM, 4 * DIM)
        tensors[own + "rotary_emb.inv_freq"] = torch.ones(HEAD // 2)  # a buffer of the published model, not read
    return tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(CLIP folder, file with MPS's weights)."""
    folder = tiny.clip(tmp_path_factory.mktemp("mps") / "clip", seed=1)
    clip = {
        f"model.{name}": value.contiguous() for name, value in CLIPModel.from_pretrained(folder).state_dict().items()
    }
    save_file({**clip, **cross_weights()}, folder.parent / "mps.safetensors")
    return folder, folder.parent / "mps.safetensors"


def by_hand(model, picture, prompt, mistake=None, threshold=THRESHOLD):
    """The published forward pass for one picture and prompt, with other means: rotary positions as complex numbers,
    torch's own attention over repeated keys, transformers' own image processor."""
    folder, _ = model
    clip, w = CLIPModel.from_pretrained(folder).eval(), cross_weights()
    read = AutoTokenizer.from_pretrained(folder)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(Image.fromarray(picture), return_tensors="pt").pixel_values

    def text(words):
        ids = read(words, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        mask = {"attention_mask": ids.attention_mask} if mistake == "padding not read" else {}
        out = clip.text_model(input_ids=ids.input_ids, **mask)
        return clip.text_projection(out.last_hidden_state)[0], clip.text_projection(out.pooler_output)[0]

    def heads(x):
        return x.view(len(x), HEADS, HEAD).transpose(0, 1)[None]

    def shared(x):
        return x[None, None].expand(1, HEADS, -1, -1)

    def joined(x):
        return x[0].transpose(0, 1).reshape(-1, HEADS * HEAD)

    def turn(x):
        if mistake == "no positions":
            return x
        pairs = torch.complex(*x.float().chunk(2, dim=-1))
        speed = torch.tensor([10000 ** (-2 * i / HEAD) for i in range(HEAD // 2)])
        angle = torch.arange(x.shape[-2])[:, None] * speed
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def glu(x):
        first, second = x.chunk(2, dim=-1)
        if mistake == "gate the wrong way":
            first, second = second, first
        return first * second * torch.sigmoid(second)

    attention = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        words, end = text(prompt)
        asked, _ = text(CONDITION)
        likeness = torch.stack([(asked @ word).max() for word in words])
        allowed = likeness / likeness.max() > threshold
        allowed = torch.ones_like(allowed) if mistake == "no mask" else allowed
        seen = clip.vision_model(pixel_values=pixels).last_hidden_state[0]
        if mistake == "normed tokens":
            seen = clip.vision_model.post_layernorm(seen)
        x = clip.visual_projection(seen)
        for n in range(LAYERS):
            cross, own = f"cross_model.layers.{n}.0.fn.", f"cross_model.layers.{n}.1.fn."
            h = torch.nn.functional.layer_norm(x, (DIM,), w[cross + "norm.weight"])
            k, v = (words @ w[cross + "to_kv.weight"].T).split(HEAD, dim=1)
            q = heads(h @ w[cross + "to_q.weight"].T)
            taken = joined(attention(q, shared(k), shared(v), attn_mask=allowed.expand(1, 1, len(x), -1)))
            x = (
                x
                + taken @ w[cross + "to_out.weight"].T
                + glu(h @ w[cross + "ff.0.weight"].T) @ w[cross + "ff.2.weight"].T
            )
            h = torch.nn.functional.layer_norm(x, (DIM,), w[own + "norm.weight"])
            q, k, v, ff = (h @ w[own + "fused_attn_ff_proj.weight"].T).split([HEADS * HEAD, HEAD, HEAD, 8 * DIM], dim=1)
            taken = joined(attention(turn(heads(q)), shared(turn(k)), shared(v)))
            x = x + taken @ w[own + "attn_out.weight"].T + glu(ff) @ w[own + "ff_out.1.weight"].T
        first = x.mean(0) if mistake == "mean of tokens" else x[0]
        return float(clip.logit_scale.exp() * torch.cosine_similarity(first, end, dim=0))


def score(model, media, items, **args):
    folder, weights = model
    args = {"condition": CONDITION, "threshold": THRESHOLD, **args}
    return run("mps", media, items, weights=str(weights), model=str(folder), **args)


@pytest.mark.parametrize("shape", [(32, 32), (45, 72), (70, 33)])
def test_it_is_the_published_forward_pass(model, shape):
    media = tiny.pictures(3, *shape)
    texts = ["a red cat", "二つの青い四角", "a very long prompt " * 9]
    result = score(model, media, tiny.items(*texts), batch=2)
    expected = [by_hand(model, frame, text) for frame, text in zip(media.frames[:, 0], texts, strict=True)]
    np.testing.assert_allclose(result.values, expected, atol=1e-4)
    assert result.parts["cut_tokens"].tolist()[:1] == [0] and result.parts["cut_tokens"][2] > 0
    published = score(model, media, tiny.items(*texts), threshold=0.3, scale=10).values
    expected = [by_hand(model, f, t, threshold=0.3) / 10 for f, t in zip(media.frames[:, 0], texts, strict=True)]
    np.testing.assert_allclose(published, expected, atol=1e-4)
    assert np.abs(score(model, media, tiny.items(*texts), condition="hands").values - result.values).max() > 1e-2


@pytest.mark.parametrize(
    "mistake",
    ["no mask", "no positions", "normed tokens", "padding not read", "gate the wrong way", "mean of tokens"],
)
def test_the_usual_mistakes_would_be_noticed(model, mistake):
    media = tiny.pictures(1)
    right = score(model, media, tiny.items("a red cat")).values[0]
    assert abs(by_hand(model, media.frames[0, 0], "a red cat", mistake) - right) > 1e-2


def test_a_score_does_not_depend_on_what_is_scored_beside_it(model):
    media, items = tiny.pictures(4), tiny.items("a cat", "two dogs in the rain", "x", "a cat")
    whole = score(model, media, items).values
    for i, item in enumerate(items):
        one = type(media)(frames=media.frames[i : i + 1], fps=1)
        assert score(model, one, [item]).values[0] == pytest.approx(whole[i], abs=1e-5)


def test_weights_of_other_models_and_broken_ones_are_refused(model, tmp_path):
    folder, weights = model
    from safetensors.torch import load_file

    tensors = load_file(weights)
    old = {k: v for k, v in tensors.items() if k.startswith("model.")} | cross_weights(old_names=True)
    save_file(old, tmp_path / "old.safetensors")
    media, items = tiny.pictures(1), tiny.items("a cat")
    same = score((folder, tmp_path / "old.safetensors"), media, items).values
    np.testing.assert_array_equal(same, score(model, media, items).values)
    for name, keep, message in (
        ("none", lambda k: k.startswith("cross"), "no weights named model"),
        ("plain", lambda k: k.startswith("model."), "no whole cross_model"),
        ("hole", lambda k: "layers.1.0.fn.to_q" not in k, r"cross_model\.layers\.1\.0\.fn\.to_q\.weight is missing"),
        ("clip", lambda k: "visual_projection" not in k, "not in the checkpoint"),
    ):
        save_file({k: v for k, v in tensors.items() if keep(k)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError, match=message):
            score((folder, tmp_path / f"{name}.safetensors"), media, items)


def test_scores_with_gradients_are_the_servers(model):
    folder, weights = model
    args = {"condition": CONDITION, "threshold": THRESHOLD, "weights": str(weights), "model": str(folder), "batch": 2}
    runner = build_reward("r", RewardConfig(scorer="mps", args=args))
    prompts = tiny.items("a red cat", "a blue mat", "the cat")
    assert gap_to_server(runner, tiny.pictures(3, 32, 32), prompts) < 1e-4
    check_slope(runner, tiny.pictures(3, 40, 32), prompts, eps=0.005)
