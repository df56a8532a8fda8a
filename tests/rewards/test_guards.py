"""What guards measure: known pictures and clips, and takes compared with each other."""

import numpy as np
import pytest

from pipeline.core.types import Media
from pipeline.rewards.guards import GUARDS, across, measure, merged

RNG = np.random.default_rng(0)


def values(*takes):
    """Measurements of takes, each uint8 [F, H, W, 3] or a picture [H, W, 3]."""
    frames = np.stack([take if take.ndim == 4 else take[None] for take in takes])
    return measure(Media(frames=frames, fps=8.0)).values


def grey(level, height=32, width=32):
    return np.full((height, width, 3), level, np.uint8)


def test_pictures():
    red = grey(0)
    red[..., 0] = 200
    halves = grey(100)
    halves[:, 16:] = 200
    noisy = np.clip(128 + RNG.normal(0, 20, (32, 32, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
    found = values(grey(128), red, halves, noisy, grey(255))
    assert found["brightness"] == pytest.approx([128 / 255, 0.299 * 200 / 255, 150 / 255, 0.5, 1], abs=0.01)
    assert found["contrast"] == pytest.approx([0, 0, 50 / 255, 20 / 255, 0], abs=0.005)
    assert found["saturation"] == pytest.approx([0, 200 / 255, 0, 0, 0], abs=1e-6)
    assert found["clipping"] == pytest.approx([0, 2 / 3, 0, 0, 1], abs=1e-6)
    assert found["uniform"].tolist() == [1, 1, 0, 0, 1]
    assert found["noise"] == pytest.approx([0, 0, found["noise"][2], 20 / 255, 0], abs=0.008)  # Immerkaer: its sigma
    assert found["sharpness"][3] > 3 * found["sharpness"][2] > 0 == found["sharpness"][0]
    assert "motion" not in found


def test_blurring_lowers_sharpness_and_spares_brightness():
    sharp = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    blurred = ((sharp[:-1, :-1].astype(int) + sharp[1:, :-1] + sharp[:-1, 1:] + sharp[1:, 1:]) // 4).astype(np.uint8)
    first, second = values(sharp), values(blurred)
    assert second["sharpness"] < 0.5 * first["sharpness"] and second["noise"] < 0.5 * first["noise"]
    assert second["brightness"] == pytest.approx(first["brightness"], abs=0.01)


def clip(position):
    """A square on grey, 8 frames; `position` [F] of its left edge."""
    frames = np.full((8, 64, 64, 3), 100, np.uint8)
    for frame, left in zip(frames, position, strict=True):
        frame[20:40, left : left + 16] = 220
    return frames


def test_clips():
    moving, shaking, still = clip(range(0, 24, 3)), clip([8, 11] * 4), clip([8] * 8)
    flickering = np.full((8, 64, 64, 3), 90, np.uint8)
    flickering[::2] = 150
    found = values(moving, shaking, still, flickering)
    assert found["motion"][0] == pytest.approx(found["motion"][1]) and found["motion"][2] < 1e-6
    assert found["frozen"].tolist() == [0, 0, 1, 0]
    assert found["smoothness"][0] > 0.4 > found["smoothness"][1] == pytest.approx(0, abs=0.01)
    assert found["flicker"] == pytest.approx([0, 0, 0, 60 / 255], abs=0.001)


def test_a_large_clip_is_measured_like_a_small_one():
    small = clip(range(0, 32, 4))
    large = small.repeat(4, axis=1).repeat(4, axis=2)
    for name, each in values(large).items():
        if name not in ("sharpness", "noise"):  # of the finest detail
            assert each == pytest.approx(values(small)[name], abs=1e-4), name


def test_takes_are_compared_within_and_across_prompts():
    takes = RNG.integers(0, 256, (6, 48), dtype=np.uint8)
    takes[1] = takes[0]  # a prompt's two takes are one picture
    prompts = np.array([0, 0, 1, 1, 2, 2])
    found = across(takes, prompts)
    far = np.sqrt(np.square(takes[2] / 255.0 - takes[3] / 255.0).mean())
    assert found["diversity"][:2] == pytest.approx([0, 0], abs=1e-3) and found["diversity"][2] == pytest.approx(
        far, abs=1e-5
    )
    assert found["duplicates"].tolist() == [1, 1, 0, 0, 0, 0]
    assert found["variety"][0] == found["variety"][1] > 0.3 and "distance" not in found
    alone = across(takes, np.arange(6))
    assert "diversity" not in alone and len(alone["variety"]) == 6


def test_distance_is_one_where_a_take_is_as_far_as_another_prompts():
    takes = RNG.integers(0, 256, (60, 192), dtype=np.uint8)
    prompts = np.arange(60)
    assert across(takes, prompts, takes)["distance"].tolist() == [0] * 60
    assert across(takes[::-1], prompts, takes)["distance"].mean() == pytest.approx(1, abs=0.05)
    assert "distance" not in across(takes[:50], prompts[:50], takes)  # not the same takes


def test_groups_are_joined_in_order():
    one, two = (measure(Media(frames=np.stack([grey(level)[None]]), fps=1.0)) for level in (10, 200))
    joined = merged([one, two])
    assert joined.values["brightness"] == pytest.approx([10 / 255, 200 / 255]) and joined.descriptors.shape == (2, 192)


def test_allowed_ranges():
    assert GUARDS["motion"].allowed(0.1, 2.0) == pytest.approx((0.05, 0.2))
    assert GUARDS["motion"].allowed(0.001, 2.0) == pytest.approx((-0.004, 0.006))  # hardly any motion: `least` counts
    assert GUARDS["noise"].allowed(0.05, 2.0) == (-np.inf, 0.1)
    assert GUARDS["duplicates"].allowed(0.2, 0.1) == (-np.inf, pytest.approx(0.3))
    assert GUARDS["distance"].allowed(0.0, 1.0) == (-np.inf, 1.0)
