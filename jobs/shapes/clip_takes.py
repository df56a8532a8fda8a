"""Drawn pictures and frames of clips as the shipped generators make them: noised, denoised by the generator, decoded.

The labels stay those of the scene drawn, though a generator changes some of it, the more so the higher the noise
level: at level 1 they are takes of the caption. `as_seen` labels them by what the scene checker sees instead. Only
scenes and captions of the generators' training side are used.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from jobs.shapes.clip_pictures import CAPTIONS, SCENES, SLOTS, Pictures, draw_pictures, joined
from jobs.shapes.make import to_pixels
from jobs.shapes.parts import RECIPES, TEXT_LENGTH, ImageParts, VideoParts
from pipeline.rewards.models import scene_world
from pipeline.rewards.scorers.scene import find_in_frames

STEPS = 5  # denoising steps from any noise level
MILD = (0.0, 0.3, 0.45, 0.6, 0.75)  # noise levels before the schedule's shift; 0: the autoencoder alone
STRONG = (0.75, 1.0)
BATCH = 20


def load_parts(kind: str, models: Path) -> ImageParts | VideoParts:
    """The shipped generator's modules."""
    parts = ImageParts() if kind == "image" else VideoParts()
    saved = DiffusionPipeline.from_pretrained(str(models / f"shapes-{kind}"))
    for name, _ in list(parts.named_children()):
        setattr(parts, name, saved.components[name])
    return parts.eval()


@torch.no_grad()
def redraw(
    parts: ImageParts | VideoParts, drawn: np.ndarray, captions: list[str], level: float, generator: torch.Generator
) -> np.ndarray:
    """Pictures uint8 [B, 48, 48, 3] or clips [B, 9, 48, 48, 3], noised to `level` and denoised under their captions."""
    latents = parts.normalise(parts.encode_pixels(to_pixels(drawn))[0])
    if level > 0:
        inputs = parts.tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        shift = RECIPES["image" if drawn.ndim == 4 else "video"].shift
        levels = torch.linspace(level, 0, STEPS + 1)
        levels = shift * levels / (1 + (shift - 1) * levels)
        latents = latents + levels[0] * (torch.randn(latents.shape, generator=generator) - latents)
        for now, after in zip(levels, levels[1:], strict=False):
            latents = latents + (after - now) * parts.velocity(latents, now.expand(len(latents)), inputs.input_ids)
    pixels = parts.decode_pixels(parts.denormalise(latents)).clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy()


def redrawn_images(
    models: Path, count: int, levels: tuple[float, ...], rng: np.random.Generator, generator: torch.Generator
) -> Pictures:
    """`count` pictures, by the image generator; the levels take turns."""
    parts, sets = load_parts("image", models), []
    for start in range(0, count, BATCH):
        scenes = [SCENES.index(scene_world.sample_scene(rng)) for _ in range(min(BATCH, count - start))]
        drawn = draw_pictures(scenes, rng, botch=0.0)
        level = levels[start // BATCH % len(levels)]
        pixels = redraw(parts, drawn.pixels, [CAPTIONS[i] for i in scenes], level, generator)
        sets.append(replace(drawn, pixels=pixels, redrawn=np.ones(len(drawn), bool)))
    return joined(sets)


def redrawn_frames(
    models: Path, clips: int, levels: tuple[float, ...], rng: np.random.Generator, generator: torch.Generator
) -> Pictures:
    """All frames of so many clips, by the video generator; the levels take turns."""
    parts, sets = load_parts("video", models), []
    for start in range(0, clips, BATCH):
        scenes = [scene_world.sample_scene(rng, video=True) for _ in range(min(BATCH, clips - start))]
        drawn = np.stack([scene_world.draw_video(scene, rng) for scene in scenes])
        level = levels[start // BATCH % len(levels)]
        pixels = redraw(parts, drawn, [scene_world.caption(scene) for scene in scenes], level, generator)
        at_rest = [SCENES.index(scene_world.Scene(scene.colour, scene.shape)) for scene in scenes]
        labels = draw_pictures(list(np.repeat(at_rest, scene_world.FRAMES)), rng, botch=0.0)
        labels.places[:, 0] = [_place(frame) for clip in drawn for frame in clip]
        frames = pixels.reshape(-1, *pixels.shape[2:])
        sets.append(replace(labels, pixels=frames, redrawn=np.ones(len(labels), bool)))
    return joined(sets)


def as_seen(pictures: Pictures) -> Pictures:
    """The same pictures, labelled by the objects that the scene checker sees in them."""
    colours, shapes, places = (np.zeros_like(a) for a in (pictures.colours, pictures.shapes, pictures.places))
    for row, objects in enumerate(find_in_frames(pictures.pixels)):
        for slot, item in enumerate(objects[:SLOTS]):
            if item.colour is not None:
                colours[row, slot, list(scene_world.PALETTE).index(item.colour)] = 1.0
            if item.shape is not None:
                shapes[row, slot, scene_world.SHAPES.index(item.shape)] = 1.0
            size = scene_world.SIZE
            places[row, slot] = item.x * size, item.y * size, (item.area / np.pi) ** 0.5, item.area
    return replace(pictures, colours=colours, shapes=shapes, places=places)


def _place(frame: np.ndarray) -> tuple[float, float, float, float]:
    """Centre, radius and area of the one object on a drawn frame uint8 [48, 48, 3]."""
    rows, columns = np.nonzero(abs(frame.astype(int) - frame[0, 0]).max(-1) > 40)
    sides = np.ptp(columns) + 1, np.ptp(rows) + 1
    x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    return float(x), float(y), float(max(sides)) / 2, float(len(rows))
