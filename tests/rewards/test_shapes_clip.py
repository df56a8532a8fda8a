"""The shipped CLIP of the shapes: loads as any CLIP does, tells captions apart; and the job that makes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reward_math import run

from jobs.shapes import clip, clip_pictures
from jobs.shapes.clip_pictures import CAPTIONS, SCENES, caption_credits, draw_pictures
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.models import scene_world
from pipeline.rewards.scorers.scene import check_image

FOLDER = Path(__file__).parents[2] / "models" / "shapes-clip"


def clip_scores(frames: np.ndarray, texts: list[str]) -> np.ndarray:
    prompts = [PromptItem(index=i, text=text) for i, text in enumerate(texts)]
    return run("clip_score", Media(frames=frames[:, None], fps=1.0), prompts, model=str(FOLDER)).values


def test_folder_is_small_and_holds_only_safetensors_weights():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_right_captions_beat_those_with_one_wrong_attribute():
    rng = np.random.default_rng(5)
    scenes = [int(rng.integers(168)) for _ in range(30)] + [int(rng.integers(168, len(SCENES))) for _ in range(30)]
    frames, right, wrong = [], [], []
    pictures = draw_pictures(scenes, rng, botch=0.0)
    for i, picture in zip(scenes, pictures.pixels, strict=True):
        for name in scene_world.stated_attributes(SCENES[i]):
            frames.append(picture)
            right.append(CAPTIONS[i])
            wrong.append(scene_world.caption(scene_world.changed(SCENES[i], name, rng)))
    better = clip_scores(np.stack(frames), right) > clip_scores(np.stack(frames), wrong)
    assert better.mean() >= 0.9, [
        pair for pair, good in zip(zip(right, wrong, strict=True), better, strict=True) if not good
    ]


def test_frames_of_clips_are_told_apart_whatever_the_motion():
    rng = np.random.default_rng(6)
    scenes = [scene_world.sample_scene(rng, video=True) for _ in range(10)]
    frames = np.stack([scene_world.draw_video(scene, rng)[4] for scene in scenes])
    right = [scene_world.caption(scene) for scene in scenes]
    wrong = [
        scene_world.caption(scene_world.changed(scene, ("colour", "shape")[i % 2], rng))
        for i, scene in enumerate(scenes)
    ]
    assert (clip_scores(frames, right) > clip_scores(frames, wrong)).sum() >= 9


@pytest.mark.parametrize(("botch", "least"), [(0.0, 0.98), (0.25, 0.93)])
def test_labels_from_what_was_drawn_agree_with_the_checker(botch, least):
    rng = np.random.default_rng(0)
    scenes = [int(rng.integers(len(SCENES))) for _ in range(20)] + [int(rng.integers(168)) for _ in range(20)]
    pictures = draw_pictures(scenes, rng, botch)
    captions = np.unique([*scenes, *rng.integers(168, size=20), *rng.integers(len(SCENES), size=20)])
    labels = caption_credits(pictures, captions)
    checked = [
        [np.mean(list(check_image(picture, CAPTIONS[i]).values())) for i in captions] for picture in pictures.pixels
    ]
    assert np.corrcoef(labels.ravel(), np.ravel(checked))[0, 1] > least
    if not botch:
        assert labels[np.arange(40), np.searchsorted(captions, scenes)].min() == 1.0


def test_the_loss_is_least_where_logits_are_the_truth():
    credits = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    logits = (clip.SHARPNESS * credits).requires_grad_()
    clip.contrastive_loss(logits, credits).backward()
    assert logits.grad.abs().max() < 1e-7
    flipped = (-logits).detach().requires_grad_()
    clip.contrastive_loss(flipped, credits).backward()
    better = flipped.detach() - flipped.grad
    assert clip.contrastive_loss(better, credits) < clip.contrastive_loss(flipped, credits)


def test_a_step_shows_captions_beside_neighbours():
    pictures = draw_pictures(list(range(len(SCENES))), np.random.default_rng(1), botch=0.0)
    pictures = replace(pictures, redrawn=np.arange(len(pictures)) % 3 == 0)
    texts, shown, credits = clip.Sampler(pictures, clip.STAGES[-1], np.random.default_rng(2)).step()
    assert len(shown) == len(texts) + clip.STAGES[-1].takes and shown.redrawn[len(texts) :].all()
    assert credits.shape == (len(shown), len(texts)) and credits.diagonal().min() == 1.0
    assert ((credits > 0.6) & (credits < 1)).any(dim=1).float().mean() > 0.9  # nearly right captions for every picture
    targets = clip.patch_targets(shown)
    assert targets.shape == (len(shown), (clip_pictures.SIZE // clip.PATCH) ** 2, 10)
    assert set(targets.sum(-1).unique().tolist()) == {0.0, 2.0}  # background, or one colour and one shape


def test_redrawing_at_level_zero_is_the_autoencoder_alone():
    from jobs.shapes.clip_takes import load_parts, redraw

    parts = load_parts("image", FOLDER.parent)
    drawn = draw_pictures([30, 500], np.random.default_rng(3), botch=0.0).pixels
    again = redraw(parts, drawn, [CAPTIONS[30], CAPTIONS[500]], 0.0, torch.Generator())
    assert again.dtype == np.uint8 and np.abs(again.astype(int) - drawn).mean() < 6
    noised = redraw(parts, drawn, [CAPTIONS[30], CAPTIONS[500]], 0.6, torch.Generator().manual_seed(0))
    assert np.abs(noised.astype(int) - drawn).mean() > np.abs(again.astype(int) - drawn).mean()


def test_what_the_checker_sees_becomes_a_label_with_its_scores():
    from jobs.shapes.clip_takes import as_seen

    rng = np.random.default_rng(8)
    scenes = [int(rng.integers(len(SCENES))) for _ in range(20)] + [int(rng.integers(168)) for _ in range(20)]
    pictures = as_seen(draw_pictures(scenes, rng, botch=0.4))
    captions = np.unique([*scenes, *rng.integers(len(SCENES), size=20)])
    checked = [[np.mean(list(check_image(p, CAPTIONS[i]).values())) for i in captions] for p in pictures.pixels]
    assert np.abs(caption_credits(pictures, captions) - checked).max() < 1e-6
