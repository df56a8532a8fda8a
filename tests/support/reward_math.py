"""Straightforward computations that the reward models are compared with: preprocessing by PIL, CLIP as a whole."""

from __future__ import annotations

import numpy as np
import tiny_rewards as tiny
import torch
from PIL import Image
from transformers import CLIPModel

from pipeline.config.schema import RewardConfig
from pipeline.rewards.models.images import CLIP_MEAN, CLIP_STD
from pipeline.rewards.runner import build_reward


def run(scorer, media, prompts, seed=None, **args):
    return build_reward("r", RewardConfig(scorer=scorer, args=args)).run(media, prompts, seed)


def pil(media):
    return [Image.fromarray(frame) for frame in media.frames[:, 0]]


def normalised(pictures, mean=CLIP_MEAN, std=CLIP_STD):
    """Square PIL pictures -> [N, 3, S, S], the way torchvision's ToTensor and Normalize do it."""
    x = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def letterboxed(picture, size=tiny.SIZE):
    scale = size / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    square = Image.new("RGB", (size, size))
    square.paste(picture.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return square


def centred(picture, size=tiny.SIZE, short=None):
    """Short side to `short`, central square, as torchvision's Resize and CenterCrop."""
    short = short or size
    w, h = picture.size
    w, h = (int(short * w / h), short) if h <= w else (short, int(short * h / w))
    left, top = round((w - size) / 2), round((h - size) / 2)
    return picture.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


@torch.no_grad()
def whole_clip(folder, pixels, texts):
    """(unit picture vectors, unit text vectors, logit scale, logits) of the whole CLIP model, one pair at a time."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = tiny.clip_tokenizer()
    rows = []
    for x, text in zip(pixels, texts, strict=True):
        ids = tokenizer(text, truncation=True, max_length=77, padding="max_length", return_tensors="pt")
        out = model(**ids, pixel_values=x[None])
        rows.append((out.image_embeds[0], out.text_embeds[0], out.logits_per_image[0, 0]))
    images, words, logits = (torch.stack(part) for part in zip(*rows, strict=True))
    return images, words, model.logit_scale.exp(), logits


def cosine(images, words):
    return (images * words).sum(-1).numpy()
