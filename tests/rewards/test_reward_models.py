"""Reward models on small random weights against straightforward computations with the libraries' own whole models,
preprocessing included; and what would happen with the usual mistakes."""

import shutil

import numpy as np
import pytest
import tiny_rewards as tiny
import torch
from PIL import Image
from pixel_gradients import check_slope, gap_to_server
from reward_math import centred, cosine, letterboxed, normalised, pil, run, whole_clip
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPModel

from pipeline.config.schema import RewardConfig
from pipeline.core.devices import resolve_device
from pipeline.core.errors import ConfigError, InputError, RewardError
from pipeline.core.types import Media
from pipeline.rewards.models.images import CLIP_MEAN, CLIP_STD, Preprocess, place, preprocess
from pipeline.rewards.runner import build_reward
from pipeline.rewards.scorers.image_reward import transformers_name

TEXTS = ("a red cat", "Eine Tür, 猫 und кот!", "", "a red cat")
LONG = "a very long prompt " * 20


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("shape", [(45, 70), (70, 45), (33, 47), (32, 32), (20, 90)])
def test_clip_score_and_pickscore_match_transformers_whole_pipeline(clip, shape):
    media, prompts = tiny.pictures(4, *shape), tiny.items(*TEXTS)
    processor = AutoProcessor.from_pretrained(clip, backend="pil")
    inputs = processor(images=pil(media), text=list(TEXTS), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = CLIPModel.from_pretrained(clip).eval()(**inputs)
    logits = out.logits_per_image.diagonal().numpy()
    score = run("pickscore", media, prompts, model=str(clip), batch=3)
    np.testing.assert_allclose(score.values, logits, atol=1e-4)
    scaled = run("pickscore", media, prompts, model=str(clip), scale=26).values
    np.testing.assert_allclose(scaled, logits / 26, atol=1e-4)
    plain = run("clip_score", media, prompts, model=str(clip), scale=100).values
    np.testing.assert_allclose(plain, 100 * cosine(out.image_embeds, out.text_embeds), atol=1e-3)
    assert np.ptp(score.values) > 0.1  # the pictures and prompts are told apart
    assert score.parts["cut_tokens"].tolist() == [0, 0, 0, 0]


def test_hpsv2_matches_the_letterboxed_cosine_and_the_usual_mistakes_do_not(clip):
    media, prompts = tiny.pictures(4), tiny.items(*TEXTS)
    images, words, scale, _ = whole_clip(clip, normalised([letterboxed(p) for p in pil(media)]), TEXTS)
    score = run("hpsv2", media, prompts, model=str(clip), batch=2).values
    np.testing.assert_allclose(score, cosine(images, words), atol=1e-4)
    boxes = [letterboxed(p) for p in pil(media)]
    wrong = {
        "centre crop": normalised([centred(p) for p in pil(media)]),
        "stretched": normalised([p.resize((32, 32), Image.Resampling.BICUBIC) for p in pil(media)]),
        "not normalised": normalised(boxes, mean=(0, 0, 0), std=(1, 1, 1)),
        "ImageNet statistics": normalised(boxes, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        "bars of the mean colour": torch.where(
            normalised(boxes) == normalised(boxes)[:, :, :1, :1], 0.0, normalised(boxes)
        ),
        "BGR": normalised(boxes).flip(1),
    }
    for name, pixels in wrong.items():
        mistaken = cosine(*whole_clip(clip, pixels, TEXTS)[:2])
        assert np.abs(mistaken - score).max() > 1e-3, name
    assert np.abs(score * float(scale) - score).max() > 0.1  # the logit scale is not in it


def test_square_pictures_are_the_only_ones_where_cropping_and_letterboxing_agree(clip):
    def both(media):
        prompts = tiny.items(*TEXTS)
        return (run(name, media, prompts, model=str(clip)).values for name in ("hpsv2", "clip_score"))

    np.testing.assert_allclose(*both(tiny.pictures(4, 64, 64)), atol=1e-6)
    letterbox, crop = both(tiny.pictures(4, 36, 64))  # 16:9
    assert np.abs(letterbox - crop).min() > 1e-3


def test_long_prompts_are_cut_at_77_tokens_with_the_end_token_kept_and_it_is_reported(clip):
    media = tiny.pictures(2)
    pixels = AutoProcessor.from_pretrained(clip, backend="pil")(images=pil(media), return_tensors="pt").pixel_values
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = tiny.clip_tokenizer()(LONG).input_ids
    kept = torch.tensor([tokens[:76] + [tiny.clip_tokenizer().eos_token_id]])
    with torch.no_grad():
        expected = model(input_ids=kept, pixel_values=pixels).logits_per_image[:, 0].numpy()
    score = run("pickscore", media, tiny.items(LONG, LONG), model=str(clip))
    np.testing.assert_allclose(score.values, expected, atol=1e-4)
    assert score.parts["cut_tokens"].tolist() == [len(tokens) - 77] * 2
    with pytest.raises(RewardError, match="tokens longer than 77"):
        run("pickscore", media, tiny.items(LONG, LONG), model=str(clip), long_prompts="error")


def resized_by_torch(frames, p):
    """The same preprocessing by torch's antialiased resize: one direction after the other, 8 bits after each."""
    new_h, new_w, top, left = place(*frames.shape[1:3], p)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    for size in ((x.shape[2], new_w), (new_h, new_w)):
        if x.shape[2:] != size:
            x = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
            x = (x * 255).round() / 255
    if p.fit == "crop":
        return x[:, :, top : top + p.size, left : left + p.size]
    return torch.nn.functional.pad(x, (-left, p.size - new_w + left, -top, p.size - new_h + top))


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("odd", ["floor", "round"])
def test_frames_are_resized_cropped_and_padded_as_by_torch(fit, odd):
    for height, width in ((45, 70), (71, 40), (20, 90), (224, 100), (32, 32)):
        frames = tiny.pictures(2, height, width).frames[:, 0]
        p = Preprocess(size=32, fit=fit, odd=odd)
        mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        a, b = preprocess(frames, p), (resized_by_torch(frames, p) - mean) / std
        assert a.shape == b.shape == (2, 3, 32, 32)
        levels = (a - b).abs() * std * 255
        assert levels.max() < 3.01 and levels.mean() < 0.3
        if (height, width) in ((45, 70), (20, 90), (32, 32)) and fit != "letterbox":  # PIL takes the rows first
            assert levels.max() < 1.01 and levels.mean() < 0.01
    with pytest.raises(RewardError, match="must be uint8"):
        preprocess(np.full((1, 8, 8, 3), np.nan), p)


def test_odd_margins_follow_the_library_that_each_model_was_published_with():
    assert place(32, 35, Preprocess(size=32, odd="floor"))[3] == 1  # transformers: 3 // 2
    assert place(32, 35, Preprocess(size=32, odd="round"))[3] == 2  # torchvision: round(1.5)
    assert place(32, 33, Preprocess(size=32, odd="round"))[3] == 0  # round(0.5), half to even
    assert place(100, 300, Preprocess(size=224, fit="letterbox")) == (75, 224, -74, 0)


@pytest.mark.parametrize("where", ["clip_score", "hpsv2"])
def test_grey_pictures_one_pixel_pictures_and_clips(clip, where):
    grey = Media(frames=np.repeat(tiny.pictures(2).frames[..., :1], 3, axis=-1), fps=1)
    dot = Media(frames=np.zeros((2, 1, 1, 1, 3), np.uint8), fps=1)
    for media in (grey, dot):
        assert np.isfinite(run(where, media, tiny.items("a", ""), model=str(clip)).values).all()
    frames = np.concatenate([tiny.pictures(5, seed=s).frames.transpose(1, 0, 2, 3, 4) for s in range(2)])
    result = run(where, Media(frames=frames, fps=8), tiny.items("a", "b"), seed=3, model=str(clip))
    assert result.segment_values.shape == (2, 4)
    frame = Media(frames=frames[1:, result.segment_frames[2, 0]][:, None], fps=8)
    alone = run(where, frame, tiny.items("b"), model=str(clip)).values[0]
    assert result.segment_values[1, 2] == pytest.approx(alone, abs=1e-5)


# ------------------------------------------------------------------------------------------- aesthetic


def aesthetic_head(folder, width=24, seed=0, last=1):
    g = torch.Generator().manual_seed(seed)
    sizes, tensors = [width, 16, 12, 8, 6, last], {}
    for number, (a, b) in zip((0, 2, 4, 6, 7), zip(sizes[:-1], sizes[1:], strict=True), strict=True):
        tensors[f"layers.{number}.weight"] = torch.randn(b, a, generator=g)
        tensors[f"layers.{number}.bias"] = torch.randn(b, generator=g)
    save_file(tensors, folder / "head.safetensors")
    return folder / "head.safetensors", tensors


def test_aesthetic_matches_linear_layers_on_the_unit_embedding(clip, tmp_path):
    path, tensors = aesthetic_head(tmp_path)
    media = tiny.pictures(3)
    images, _, _, _ = whole_clip(clip, normalised([centred(p) for p in pil(media)]), TEXTS[:3])

    def head(x, between=lambda y: y):
        for number in (0, 2, 4, 6, 7):
            x = x @ tensors[f"layers.{number}.weight"].T + tensors[f"layers.{number}.bias"]
            x = between(x) if number != 7 else x
        return x[:, 0].numpy()

    score = run("aesthetic", media, tiny.items("x", "y", ""), model=str(clip), head=str(path)).values
    np.testing.assert_allclose(score, head(images), rtol=1e-4, atol=1e-3)
    for wrong in (head(images * 3), head(images, torch.relu)):  # embedding not normalised; activations
        assert np.abs(wrong - score).max() > 0.1


def test_a_wrong_aesthetic_head_is_refused(clip, tmp_path):
    path, _ = aesthetic_head(tmp_path, width=23)
    with pytest.raises(InputError, match="do not lead from CLIP's 24 values to 1"):
        run("aesthetic", tiny.pictures(1), tiny.items("x"), model=str(clip), head=str(path))
    path, _ = aesthetic_head(tmp_path, last=2)
    with pytest.raises(InputError, match="do not lead"):
        run("aesthetic", tiny.pictures(1), tiny.items("x"), model=str(clip), head=str(path))
    (tmp_path / "head.pth").write_bytes(b"pickle")
    for head, message in ((tmp_path / "head.pth", "must be a .safetensors"), (tmp_path / "no.safetensors", "no such")):
        with pytest.raises(InputError, match=message):
            run("aesthetic", tiny.pictures(1), tiny.items("x"), model=str(clip), head=str(head))
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        run("aesthetic", tiny.pictures(1), tiny.items("x"), model=str(clip), head=str(tmp_path / "broken.safetensors"))


# ---------------------------------------------------------------------------------------- ImageReward


def official_names(name):
    """transformers' BLIP names as Salesforce's code, which ImageReward uses, has them."""
    import re

    name = re.sub(
        r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection",
        r"blip.visual_encoder.blocks.\1.attn.proj",
        name,
    )
    name = re.sub(r"^vision_model\.encoder\.layers\.(\d+)\.self_attn", r"blip.visual_encoder.blocks.\1.attn", name)
    name = re.sub(r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"blip.visual_encoder.blocks.\1.norm", name)
    name = re.sub(r"^vision_model\.encoder\.layers", "blip.visual_encoder.blocks", name)
    name = name.replace("vision_model.embeddings.patch_embedding", "blip.visual_encoder.patch_embed.proj")
    name = name.replace("vision_model.embeddings.position_embedding", "blip.visual_encoder.pos_embed")
    name = name.replace("vision_model.embeddings.class_embedding", "blip.visual_encoder.cls_token")
    name = name.replace("vision_model.post_layernorm", "blip.visual_encoder.norm")
    return re.sub(r"^text_encoder\.", "blip.text_encoder.", name)


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    """(folder with transformers' names, folder with the official ones, BLIP, head)"""
    blip = tiny.blip()
    g = torch.Generator().manual_seed(1)
    sizes = [24, 1024, 128, 64, 16, 1]
    head = {}
    for number, (a, b) in zip((0, 2, 4, 6, 7), zip(sizes[:-1], sizes[1:], strict=True), strict=True):
        head[f"mlp.layers.{number}.weight"] = torch.randn(b, a, generator=g) / a**0.5
        head[f"mlp.layers.{number}.bias"] = torch.randn(b, generator=g)
    towers = {k: v.contiguous() for k, v in blip.state_dict().items() if k.startswith(("vision_model", "text_encoder"))}
    folders = []
    for rename in (lambda n: n, official_names):
        folder = tmp_path_factory.mktemp("image_reward")
        save_file({rename(k): v for k, v in (towers | head).items()}, folder / "model.safetensors")
        blip.config.save_pretrained(folder)
        tiny.bert_tokenizer().save_pretrained(folder)
        folders.append(folder)
    return *folders, blip, head


@torch.no_grad()
def straight_image_reward(blip, head, pixels, texts, length=35, pooled=0):
    rows = []
    for x, text in zip(pixels, texts, strict=True):
        ids = tiny.bert_tokenizer()(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        y = blip(input_ids=ids.input_ids, attention_mask=ids.attention_mask, pixel_values=x[None]).question_embeds
        y = y[:, pooled]
        for number in (0, 2, 4, 6, 7):
            y = y @ head[f"mlp.layers.{number}.weight"].T + head[f"mlp.layers.{number}.bias"]
        rows.append((y.item() - 0.16717362830052426) / 1.0333394966054072)
    return np.array(rows)


@pytest.mark.parametrize("names", [0, 1])
def test_image_reward_matches_blips_own_forward_pass(image_reward, names):
    media, texts = tiny.pictures(4), ["a red cat", "the mats on the cat", "", "猫 " + "red " * 60]
    blip, head = image_reward[2:]
    pixels = normalised([centred(p) for p in pil(media)])
    expected = straight_image_reward(blip, head, pixels, texts)
    score = run("image_reward", media, tiny.items(*texts), model=str(image_reward[names]), batch=3)
    np.testing.assert_allclose(score.values, expected, atol=1e-4)
    assert score.parts["cut_tokens"].tolist() == [0, 0, 0, 28]
    wrong = {
        "another length": straight_image_reward(blip, head, pixels, texts, length=64)[3:] - expected[3:],
        "last token": straight_image_reward(blip, head, pixels, texts, pooled=-1) - expected,
        "no crop": straight_image_reward(blip, head, normalised([letterboxed(p) for p in pil(media)]), texts)
        - expected,
        "not standardised": expected * 1.0333394966054072 + 0.16717362830052426 - expected,
    }
    for name, difference in wrong.items():
        assert np.abs(difference).max() > 1e-3, name


def test_image_reward_weights_must_be_complete(image_reward, tmp_path):
    shutil.copytree(image_reward[1], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        assert transformers_name(name) == transformers_name(
            transformers_name(name)
        ) and "blip" not in transformers_name(name)
    del tensors["blip.visual_encoder.blocks.1.attn.qkv.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 weights of ImageReward .*layers\.1\.self_attn\.qkv\.weight"):
        run("image_reward", tiny.pictures(1), tiny.items("x"), model=str(tmp_path))


# ------------------------------------------------------------------------------------ loading weights


def test_weights_that_are_missing_pickled_or_of_another_kind_are_refused(clip, tmp_path):
    with pytest.raises(InputError, match="reward model .*no_such"):
        run("clip_score", tiny.pictures(1), tiny.items("x"), model=str(tmp_path / "no_such"))
    half = tmp_path / "half"
    shutil.copytree(clip, half)
    tensors = load_file(half / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "visual_projection" not in k}, half / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"1 of CLIPModel's weights are not in the checkpoint \(visual_projection"):
        run("clip_score", tiny.pictures(1), tiny.items("x"), model=str(half))
    pickled = tmp_path / "pickled"
    shutil.copytree(clip, pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="safetensors"):
        run("clip_score", tiny.pictures(1), tiny.items("x"), model=str(pickled))


@pytest.mark.parametrize(
    "scorer, args, message",
    [
        ("hpsv2", {}, "weights: not set"),
        ("aesthetic", {}, r"rewards\.r\.args\.head: aesthetic needs this option"),
        ("clip_score", {"batch": 0}, "batch: found 0"),
        ("clip_score", {"long_prompts": "cutt"}, "did you mean cut"),
        ("clip_score", {"dtype": "float8"}, "dtype: found 'float8'"),
        ("pickscore", {"scale": 0}, "scale: found 0"),
        ("subject", {"balance": 2}, "from 0 to 1"),
    ],
)
def test_wrong_options_are_config_errors(clip, scorer, args, message):
    if args:
        args = {"model": str(clip), **args}
    with pytest.raises(ConfigError, match=message):
        run(scorer, tiny.pictures(1), tiny.items("x"), **args)


def test_device():
    assert resolve_device("auto").type in ("cpu", "cuda") and resolve_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="device: found 'gpu'"):
        resolve_device("gpu")


# ------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("scorer", ["pickscore", "hpsv2", "aesthetic", "image_reward"])
def test_scores_with_gradients_are_the_servers(scorer, clip, image_reward, tmp_path):
    """To float32 at the model's own size. Elsewhere the rounding of 8 bits, to which such random weights are sensitive,
    is all that differs; other fits of the picture would differ by far more."""
    args = {
        "aesthetic": {"model": str(clip), "head": str(aesthetic_head(tmp_path)[0])},
        "image_reward": {"model": str(image_reward[0])},
    }.get(scorer, {"model": str(clip)})
    runner = build_reward("r", RewardConfig(scorer=scorer, args={**args, "batch": 2}))
    prompts = tiny.items("a red cat", "a blue mat", "the cat")
    scores = runner.run(tiny.pictures(3), prompts, None).values
    spread = np.ptp(scores)
    assert gap_to_server(runner, tiny.pictures(3, 32, 32), prompts) < 1e-4 * max(1, np.abs(scores).max())
    assert gap_to_server(runner, tiny.pictures(3), prompts) < 0.04 * spread
    check_slope(runner, tiny.pictures(3, 40, 32), prompts, eps=0.005)
