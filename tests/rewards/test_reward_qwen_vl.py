"""HPSv3 and VideoReward on a small random Qwen2-VL: against transformers' whole model, its own image processor and
peft's own adapters, one take at a time; and what the usual mistakes would give."""

import json

import numpy as np
import pytest
import tiny_qwen as tiny
import torch
from peft import LoraConfig, get_peft_model
from pixel_gradients import as_pixels, check_slope, gap_to_server
from reward_math import pil, run
from safetensors.torch import load_file, save_file
from tiny_rewards import items, pictures, spread
from torch import nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import InputError, RewardError
from pipeline.core.types import Media
from pipeline.rewards.models.images import CLIP_MEAN, CLIP_STD
from pipeline.rewards.models.qwen_vl import resized_shape
from pipeline.rewards.runner import build_reward
from pipeline.rewards.scorers import hpsv3, video_align

TEXTS = ("a red cat", "Eine Tür, 猫 {prompt}", "")


def with_tokens(words):
    tokens = tiny.qwen_tokenizer()
    tokens.add_tokens(list(words), special_tokens=True)
    return tokens


def saved(tensors, path):
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path)


def published_names(name):
    """As transformers 4.45 named them, with which both models were saved."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


@torch.no_grad()
def last_states(model, ids, patches, grid, kind, positions="plain"):
    """Last hidden states [T, D] of Qwen2VLForConditionalGeneration, called as a whole."""
    key = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    plain = {"position_ids": torch.arange(ids.shape[1]).expand(3, 1, -1)}
    types = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
    extra = plain if positions == "plain" else {"mm_token_type_ids": types}
    out = model(input_ids=ids, output_hidden_states=True, **{key[0]: patches, key[1]: grid}, **extra)
    return out.hidden_states[-1][0]


# ---------------------------------------------------------------------------------------------- HPSv3


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv3")
    tokens = with_tokens([hpsv3.TOKEN])
    model = tiny.qwen(folder, rows=len(tokens))
    head = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Dropout(0.05), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))
    spread(head, 1, std=0.5)
    tensors = {published_names(k): v for k, v in model.state_dict().items()}
    saved(tensors | {f"rm_head.{k}": v for k, v in head.state_dict().items()}, folder / "hpsv3.safetensors")
    return folder, model, tokens, head


def whole_hpsv3(hps, media, texts, pixels=256 * 28 * 28, question=hpsv3.QUESTION, positions="plain", at=None):
    """[N, 2]: transformers' image processor and model, one picture at a time."""
    _, model, tokens, head = hps
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": pixels, "longest_edge": pixels})
    rows = []
    for picture, text in zip(pil(media), texts, strict=True):
        seen = processor(images=[picture], return_tensors="pt")
        words = question.replace("{text_prompt}", text)
        ids = tiny.conversation(tokens, "image", words, int(seen.image_grid_thw.prod()) // 4)
        states = last_states(model, ids, seen.pixel_values, seen.image_grid_thw, "image", positions)
        place = (ids[0] == tokens.convert_tokens_to_ids(hpsv3.TOKEN)).nonzero()[0, 0] if at is None else at
        rows.append(head(states[place]))
    return torch.stack(rows).detach().numpy()


def score_hpsv3(hps, media, texts, **args):
    args = {"weights": str(hps[0] / "hpsv3.safetensors"), "model": str(hps[0]), "dtype": "float32"} | args
    return run("hpsv3", media, items(*texts), **args)


def test_hpsv3_is_the_published_forward_pass_and_the_usual_mistakes_are_not(hps):
    media = pictures(3, 45, 72)
    expected = whole_hpsv3(hps, media, TEXTS)
    result = score_hpsv3(hps, media, TEXTS, batch=2)
    np.testing.assert_allclose(result.values, expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(result.parts["sigma"], np.exp(expected[:, 1]), rtol=1e-4)
    assert np.ptp(expected[:, 0]) > 0.01
    mistakes = {
        "positions in time, height and width": {"positions": "3d"},
        "half the pixels": {"pixels": 128 * 28 * 28},
        "the last token": {"at": -1},
        "another blank": {"question": hpsv3.QUESTION.replace("best. \n", "best.\n")},
        "no text": {"question": hpsv3.QUESTION.replace("{text_prompt}", "")},
    }
    for name, mistake in mistakes.items():
        wrong = whole_hpsv3(hps, media, TEXTS, **mistake)[:, 0]
        assert np.abs(wrong - result.values).max() > 1e-3, name
    assert np.abs(expected[:, 1] - result.values).max() > 1e-2  # the mean is the first number


def test_hpsv3_fails_alone_on_a_prompt_with_the_models_own_words_and_on_a_sliver(hps):
    with pytest.raises(RewardError, match=r"holds <\|Reward\|>, which steers"):
        score_hpsv3(hps, pictures(1), [f"a cat {hpsv3.TOKEN}"])
    with pytest.raises(RewardError, match="aspect ratios up to 200"):
        score_hpsv3(hps, Media(frames=np.zeros((1, 1, 1, 201, 3), np.uint8), fps=1), ["a"])
    dot = score_hpsv3(hps, Media(frames=np.zeros((1, 1, 1, 1, 3), np.uint8), fps=1), ["a"])
    assert np.isfinite(dot.values).all()


def test_hpsv3_refuses_what_is_not_its_checkpoint(hps, tmp_path):
    whole = load_file(hps[0] / "hpsv3.safetensors")
    cases = {
        "rm_head.5.weight is missing": {k: v for k, v in whole.items() if k != "rm_head.5.weight"},
        "expected all weights of Qwen2-VL and a head": {k: v for k, v in whole.items() if "rm_head" not in k},
        "weights are not in the checkpoint": {k: v for k, v in whole.items() if "layers.1." not in k},
        "the tokenizer of .* needs": {
            k: v[: len(tiny.qwen_tokenizer())] if "embed" in k else v for k, v in whole.items()
        },
    }
    for message, tensors in cases.items():
        saved(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(InputError, match=message):
            score_hpsv3(hps, pictures(1), ["a"], weights=str(tmp_path / "bad.safetensors"))


def test_pictures_are_fitted_to_multiples_of_28():
    most = 256 * 28 * 28
    assert resized_shape(512, 512, most, most) == (448, 448)
    assert resized_shape(720, 1280, most, most) == (336, 588)  # 16:9: a little less than the area
    assert resized_shape(20, 20, most, most) == (448, 448)
    assert resized_shape(1, 150, most, 10 * most)[0] == 56 and resized_shape(5, 900, 784, most) == (28, 896)


# ---------------------------------------------------------------------------------------- VideoReward


@pytest.fixture(scope="module")
def video_reward(tmp_path_factory):
    """The model with a real peft adapter on the text model, saved as the authors saved theirs."""
    folder = tmp_path_factory.mktemp("video")
    tokens = with_tokens(video_align.TOKENS)
    model = tiny.qwen(folder, rows=len(tokens), seed=3)
    model.rm_head = nn.Linear(32, 1, bias=False)
    target = [n for n, m in model.model.language_model.named_modules() if isinstance(m, nn.Linear)]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[f"model.language_model.{n}" for n in target])
    adapted = get_peft_model(model, config).eval()
    torch.manual_seed(4)
    for name, p in adapted.named_parameters():
        if "lora_" in name or "rm_head" in name:
            p.data = torch.randn_like(p) * 0.2
    tensors = {published_names(k): v for k, v in adapted.state_dict().items()}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in tensors
    saved(tensors, folder / "video.safetensors")
    return folder, model, tokens


def clips(count=2, frames=16, height=60, width=90):
    still = pictures(count * frames, height, width).frames[:, 0]
    return Media(frames=still.reshape(count, frames, height, width, 3), fps=8.0)


def patches_by_hand(frames):
    """float [F, 3, H, W] normalised -> [t * h * w, 1176], written out as loops over blocks of 2 x 2 patches."""
    rows = []
    for t in range(0, len(frames), 2):
        for top in range(0, frames.shape[2], 28):
            for left in range(0, frames.shape[3], 28):
                for y, x in ((0, 0), (0, 14), (14, 0), (14, 14)):
                    block = frames[t : t + 2, :, top + y : top + y + 14, left + x : left + x + 14]
                    rows.append(block.transpose(0, 1).reshape(-1))  # channel, time, row, column
    return torch.stack(rows)


def whole_video(video_reward, media, texts, picks=(0, 5, 10, 15), size=(280, 392), positions="plain"):
    """Logits [N, 3] through the peft model, one clip at a time."""
    _, model, tokens = video_reward
    rows = []
    for clip, text in zip(media.frames, texts, strict=True):
        x = torch.from_numpy(clip[list(picks)]).permute(0, 3, 1, 2).float()
        x = nn.functional.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255).round() / 255
        x = (x - torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)) / torch.tensor(CLIP_STD).view(1, 3, 1, 1)
        grid = torch.tensor([[len(picks) // 2, size[0] // 14, size[1] // 14]])
        ids = tiny.conversation(
            tokens, "video", video_align.QUESTION.replace("{text_prompt}", text), int(grid.prod()) // 4
        )
        states = last_states(model, ids, patches_by_hand(x), grid, "video", positions)
        at = [(ids[0] == tokens.convert_tokens_to_ids(w)).nonzero()[0, 0] for w in video_align.TOKENS]
        rows.append([float(model.rm_head(states[i])) for i in at])
    return np.array(rows)


def score_video(video_reward, media, texts, **args):
    args = {"weights": str(video_reward[0] / "video.safetensors"), "model": str(video_reward[0])} | args
    return run("video_align", media, items(*texts), dtype="float32", **args)


MEAN, STD = np.array([3.6757, 1.1646, 2.8105]), np.array([2.2476, 1.3811, 2.5121])


def test_video_align_is_the_published_forward_pass_and_the_usual_mistakes_are_not(video_reward):
    media, texts = clips(), ("a red cat", "猫")
    expected = (whole_video(video_reward, media, texts) - MEAN) / STD
    result = score_video(video_reward, media, texts)
    for i, aspect in enumerate(video_align.ASPECTS):
        np.testing.assert_allclose(result.parts[aspect], expected[:, i], atol=1e-4)
    np.testing.assert_allclose(result.values, expected.sum(1), atol=1e-4)
    only = score_video(video_reward, media, texts, aspect="motion", batch=1)
    np.testing.assert_allclose(only.values, expected[:, 1], atol=1e-4)
    assert np.ptp(expected, axis=0).min() > 0.005
    mistakes = {
        "frames from the start of equal parts": {"picks": (0, 4, 8, 12)},
        "positions in time, height and width": {"positions": "3d"},
        "a smaller picture": {"size": (224, 336)},
    }
    for name, mistake in mistakes.items():
        wrong = (whole_video(video_reward, media, texts, **mistake) - MEAN) / STD
        assert np.abs(wrong.sum(1) - result.values).max() > 1e-3, name


def test_video_align_reads_alpha_and_normalisation_from_a_config_beside_the_weights(video_reward, tmp_path):
    media = clips(1)
    plain = score_video(video_reward, media, ["a"])
    raw = np.array([plain.parts[a][0] for a in video_align.ASPECTS]) * STD + MEAN
    norm = {f"{k}_{what}": v for k in ("VQ", "MQ", "TA") for what, v in (("mean", 0.0), ("std", 2.0))}
    config = {"inference_config": norm, "peft_lora_config": {"lora_r": 4, "lora_alpha": 8, "lora_enable": True}}
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    (tmp_path / "video.safetensors").write_bytes((video_reward[0] / "video.safetensors").read_bytes())
    args = {"weights": str(tmp_path / "video.safetensors")}
    found = score_video(video_reward, media, ["a"], **args)
    np.testing.assert_allclose([found.parts[a][0] for a in video_align.ASPECTS], raw / 2, atol=1e-4)
    config["peft_lora_config"]["lora_alpha"] = 4
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    assert np.abs(score_video(video_reward, media, ["a"], **args).values - found.values).max() > 1e-3
    (tmp_path / "model_config.json").write_text('{"inference_config": {}}')
    with pytest.raises(InputError, match=r"model_config.json: not VideoReward's config \(KeyError"):
        score_video(video_reward, media, ["a"], **args)


def test_video_align_shows_the_prompt_to_the_text_score_only_and_sees_the_end_of_the_clip(video_reward):
    media = clips(1)
    one, other = (score_video(video_reward, media, [text]) for text in ("a cat", "a dog on a boat"))
    for aspect in ("visual", "motion"):
        np.testing.assert_allclose(one.parts[aspect], other.parts[aspect], atol=1e-5)
    assert np.abs(one.parts["text"] - other.parts["text"]) > 1e-3
    spoilt = media.frames.copy()
    spoilt[:, -1] = 0
    assert np.abs(score_video(video_reward, Media(frames=spoilt, fps=8.0), ["a cat"]).values - one.values) > 1e-3


def test_video_align_frame_choice_follows_the_frame_rate():
    assert video_align.sampled_frames(16, 8.0) == [0, 5, 10, 15]
    assert video_align.sampled_frames(80, 8.0) == [round(i * 79 / 19) for i in range(20)]
    assert len(video_align.sampled_frames(10_000, 8.0)) == 768
    assert video_align.sampled_frames(3, 8.0) == [0, 2] and video_align.sampled_frames(2, 30.0) == [0, 1]
    with pytest.raises(RewardError, match="clips of 2 frames or more, got 1"):
        video_align.sampled_frames(1, 8.0)


# ------------------------------------------------------------------------------------------ gradients


def runner(scorer, folder, weights, batch):
    args = {"weights": str(folder / weights), "model": str(folder), "dtype": "float32", "batch": batch}
    return build_reward("r", RewardConfig(scorer=scorer, args=args))


def test_hpsv3_with_gradients_is_the_servers(hps, monkeypatch):
    monkeypatch.setattr(hpsv3, "QUESTION", "{text_prompt} " + hpsv3.TOKEN)  # short, for speed
    reward, prompts = runner("hpsv3", hps[0], "hpsv3.safetensors", batch=1), items("a red cat", "a dog")
    assert gap_to_server(reward, pictures(2, 448, 448), prompts) < 1e-4  # not resized
    spread = np.ptp(reward.run(pictures(2, 45, 72), prompts, None).values)
    assert gap_to_server(reward, pictures(2, 45, 72), prompts) < 0.02 * spread  # resized to 8 bits on the server
    check_slope(reward, pictures(2, 45, 72), prompts, eps=0.01)


def test_video_align_with_gradients_is_the_servers_on_its_own_frames(video_reward, monkeypatch):
    monkeypatch.setattr(video_align, "QUESTION", "{text_prompt} " + " ".join(video_align.TOKENS))  # short, for speed
    reward, prompts = runner("video_align", video_reward[0], "video.safetensors", batch=1), items("a red cat", "a dog")
    media = clips(2, frames=7)
    spread = np.ptp(reward.run(media, prompts, None).values)
    assert gap_to_server(reward, media, prompts) < 0.02 * spread  # rounded to 8 bits on the server
    assert gap_to_server(reward, clips(1, frames=7, height=280, width=392), prompts[:1]) < 1e-4  # not resized
    looked_at = reward.looks_at(7, None, fps=8.0)
    assert looked_at.tolist() == [0, 2, 4, 6]
    pixels = as_pixels(media)
    score = reward.gradient(pixels, prompts, None, fps=8.0)
    score.sum().backward()
    assert (pixels.grad.abs().amax(dim=(0, 2, 3, 4)) > 0).nonzero()[:, 0].tolist() == looked_at.tolist()
    only = pixels.detach()[:, looked_at].requires_grad_()
    torch.testing.assert_close(reward.gradient(only, prompts, None, fps=8.0, clip_frames=7), score)
    check_slope(reward, media, prompts, eps=0.03)
