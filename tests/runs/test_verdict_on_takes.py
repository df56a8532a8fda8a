"""The verdict on recorded takes of the shipped generators: before training, after it on rewards that are hacked, and
after an honest run. Recorded by `benchmarks.learning.hacks --takes`; each sheet shows the same prompts and seeds."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.types import Media
from pipeline.rewards.guards import GUARDS, across, measure
from pipeline.rl.evaluation import summarise_scores
from pipeline.runs.verdict import judge

SHEETS = Path(__file__).parent / "recorded_takes"
ALLOWED = {name: guard.tolerance for name, guard in GUARDS.items()}


def takes(name: str) -> np.ndarray:
    """uint8 [K, F, 48, 48, 3]; a sheet of pictures has two rows of takes, one of clips a row per clip."""
    sheet = np.asarray(Image.open(SHEETS / f"{name}.png"))
    cells = sheet.reshape(sheet.shape[0] // 48, 48, sheet.shape[1] // 48, 48, 3).transpose(0, 2, 1, 3, 4)
    return cells if name.startswith("video") else cells.reshape(-1, 1, 48, 48, 3)


def verdict(start: np.ndarray, end: np.ndarray):
    """Of a run whose reward, brightness or motion, rises."""
    records = []
    before = measure(Media(frames=start, fps=8.0)).descriptors
    for step, frames in ((0, start), (10, end)):
        measured = measure(Media(frames=frames, fps=8.0))
        prompts = np.arange(len(frames))
        guards = measured.values | across(measured.descriptors, prompts, before if step else None)
        rewards = {"proxy": np.linspace(0, 1, len(frames), dtype=np.float32) + step / 100}
        records.append({"step": step, **summarise_scores(rewards, {"proxy": 1.0}, prompts, guards).record()})
    return judge(records, {"proxy": 1.0}, ALLOWED)


@pytest.mark.parametrize(
    "start, end, names",
    [
        ("image-start", "image-brightness", {"variety"}),
        ("video-start", "video-any-motion", {"motion"}),
    ],
)
def test_a_hack_is_suspect(start, end, names):
    found = verdict(takes(start), takes(end))
    assert found.kind == "suspect" and names <= {suspect.name for suspect in found.suspects}, found.text


def test_an_honest_run_and_other_takes_are_not():
    assert verdict(takes("image-start"), takes("image-honest")).kind == "improved"
    assert verdict(takes("image-start"), takes("image-start")).kind == "improved"  # nothing but the reward has changed


def test_frozen_flickering_shaking_and_copied_clips_are_suspect():
    clips = takes("video-start")
    frozen = np.broadcast_to(clips[:, :1], clips.shape)
    flickering = np.clip(clips.astype(int) - 60 * (np.arange(9) % 2)[None, :, None, None, None], 0, 255).astype(
        np.uint8
    )
    shaking = np.where((np.arange(9) % 2 == 1)[None, :, None, None, None], np.roll(clips, 6, axis=3), clips)
    copied = np.broadcast_to(clips[:1], clips.shape)
    for end, name in ((frozen, "frozen"), (flickering, "flicker"), (shaking, "smoothness"), (copied, "duplicates")):
        found = verdict(clips, np.ascontiguousarray(end))
        assert name in {suspect.name for suspect in found.suspects}, (name, found.text)


def test_blurred_noisy_dark_and_grey_pictures_are_suspect():
    pictures = takes("image-start")
    rng = np.random.default_rng(0)
    small = [Image.fromarray(each[0]).resize((8, 8), Image.Resampling.BOX) for each in pictures]
    blurred = np.stack([np.asarray(each.resize((48, 48)))[None] for each in small])
    noisy = np.clip(pictures + rng.normal(0, 12, pictures.shape), 0, 255).astype(np.uint8)
    dark = (pictures * 0.6).astype(np.uint8)
    white = np.full_like(pictures, 250)
    for end, name in ((blurred, "sharpness"), (noisy, "noise"), (dark, "brightness"), (white, "uniform")):
        found = verdict(pictures, end)
        assert name in {suspect.name for suspect in found.suspects}, (name, found.text)
