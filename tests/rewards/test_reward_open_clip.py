"""HPSv2's published weights have open_clip's layout: loaded into transformers' CLIP they must compute the same as a
model written down the way open_clip is."""

import math

import numpy as np
import pytest
import tiny_rewards as tiny
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import InputError
from pipeline.rewards.models.images import Preprocess, preprocess
from pipeline.rewards.runner import build_reward

WIDTH, DEPTH, HEADS, SHARED = 32, 2, 2, 24


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(WIDTH, 2 * WIDTH))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(WIDTH))
        self.positional_embedding = nn.Parameter(torch.empty((tiny.SIZE // 8) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Transformer()
        self.proj = nn.Parameter(torch.empty(WIDTH, SHARED))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, words):
        super().__init__()
        self.visual, self.transformer, self.ln_final = Visual(), Transformer(), nn.LayerNorm(WIDTH)
        self.token_embedding = nn.Embedding(words, WIDTH)
        self.positional_embedding = nn.Parameter(torch.empty(77, WIDTH))
        self.text_projection = nn.Parameter(torch.empty(WIDTH, SHARED))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)))
        self.register_buffer("attn_mask", torch.full((77, 77), float("-inf")).triu(1))

    def texts(self, tokens):
        """tokens [N, 77], zero-padded after the end token, which has the highest number."""
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.attn_mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(open_clip model, its weights as safetensors, folder with CLIP's config and tokenizer and other weights)"""
    folder = tiny.clip(tmp_path_factory.mktemp("clip"), seed=5)
    config = CLIPConfig.from_pretrained(folder)
    config.text_config.hidden_act = config.vision_config.hidden_act = "gelu"  # as LAION's ViT-H/14
    config.save_pretrained(folder)
    model = OpenClip(len(tiny.clip_tokenizer()))
    tiny.spread(model, 3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        model.visual.class_embedding.copy_(torch.randn(WIDTH, generator=generator))
    path = tmp_path_factory.mktemp("hps") / "hps.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model, path, folder


def test_hpsv2_from_open_clips_weights(published):
    model, path, folder = published
    texts = ["a red cat", "猫", "", "words " * 40]
    tokenizer = tiny.clip_tokenizer()
    tokens = torch.zeros(4, 77, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        ids = tokenizer(text).input_ids
        ids = ids if len(ids) <= 77 else [*ids[:76], tokenizer.eos_token_id]  # as open_clip's tokenizer cuts
        row[: len(ids)] = torch.tensor(ids)
    media = tiny.pictures(4)
    with torch.no_grad():
        pixels = preprocess(media.frames[:, 0], Preprocess(size=tiny.SIZE, fit="letterbox"))
        images, words = (nn.functional.normalize(x, dim=-1) for x in (model.visual(pixels), model.texts(tokens)))
    cfg = RewardConfig(scorer="hpsv2", args={"weights": str(path), "model": str(folder)})
    score = build_reward("hps", cfg).run(media, tiny.items(*texts), None).values
    np.testing.assert_allclose(score, (images * words).sum(-1), atol=1e-4)
    assert np.ptp(score) > 0.05
    other = build_reward("hps", RewardConfig(scorer="hpsv2", args={"model": str(folder)}))
    assert np.abs(other.run(media, tiny.items(*texts), None).values - score).max() > 0.01  # not the folder's weights


def test_incomplete_weights_are_refused(published, tmp_path):
    model, _, folder = published
    state = {k: v.contiguous() for k, v in model.state_dict().items() if "resblocks.1.attn.in_proj_weight" not in k}
    save_file(state, tmp_path / "half.safetensors")
    cfg = RewardConfig(scorer="hpsv2", args={"weights": str(tmp_path / "half.safetensors"), "model": str(folder)})
    with pytest.raises(InputError, match="6 of CLIPModel's weights are not in the checkpoint"):
        build_reward("hps", cfg)
