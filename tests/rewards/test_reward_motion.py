"""Motion, smoothness and flicker on clips whose motion is known; scorers around scorers."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pipeline.config.sections.rewards import RewardConfig, SegmentsConfig
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.models.optical_flow import grey_frames, optical_flow, warp
from pipeline.rewards.runner import build_reward, check_reward


def texture(height=64, width=96, seed=0):
    field = gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), 2.5)
    return (128 + 100 * field / np.abs(field).max()).astype(np.float32)


def moving(speeds, height=64, width=96, seed=0):
    """uint8 [F, H, W, 3]: a texture shifted by the cumulated `speeds` (pixels to the right per frame)."""
    big = texture(height, width + 128, seed)
    places = np.concatenate([[0.0], np.cumsum(speeds)])
    frames = []
    for x in places:
        columns = np.arange(width) + 64 - x
        low = np.floor(columns).astype(int)
        share = columns - low
        frames.append(big[:, low] * (1 - share) + big[:, low + 1] * share)
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1).round().astype(np.uint8)


def score(name, *clips, fps=8.0, **args):
    media = Media(frames=np.stack(clips), fps=fps)
    prompts = [PromptItem(index=i, text="") for i in range(len(clips))]
    return build_reward("m", RewardConfig(scorer=name, args=args)).run(media, prompts, 0).values


@pytest.mark.parametrize("dx, dy", [(0.0, 0.0), (1.5, 0.0), (-3.0, 2.0), (6.0, -4.0)])
def test_flow_finds_a_known_shift(dx, dy):
    rows, columns = np.mgrid[:64, :96].astype(np.float32)
    first = texture()
    second = warp(first, np.stack([np.full_like(rows, -dy), np.full_like(columns, -dx)]))
    flow = optical_flow(first, second)[:, 12:-12, 12:-12]
    np.testing.assert_allclose(np.median(flow, axis=(1, 2)), [dy, dx], atol=0.15)


def test_flow_of_flat_and_tiny_pictures_is_finite_and_still():
    for shape in ((1, 1), (2, 5), (40, 40)):
        flat = np.full(shape, 7.0, np.float32)
        assert np.abs(optical_flow(flat, flat)).max() == 0
        assert np.isfinite(optical_flow(flat, flat + 50)).all()


def test_dynamics_is_the_speed_in_short_sides_per_second():
    still, slow, fast = moving([0] * 5), moving([1] * 5), moving([3] * 5)
    values = score("motion_dynamics", still, slow, fast, fps=8.0, short_side=64, fraction=0.5)
    np.testing.assert_allclose(values, [0, 8 / 64, 24 / 64], rtol=0.3, atol=1e-3)
    np.testing.assert_allclose(
        score("motion_dynamics", slow, fps=16, short_side=64, fraction=0.5), 2 * values[1], rtol=1e-5
    )
    np.testing.assert_allclose(score("motion_dynamics", slow, short_side=32, fraction=0.5), values[1], rtol=0.2)
    assert score("motion_dynamics", fast, cap=0.1)[0] == pytest.approx(0.1)


def test_smoothness_sees_stutter_and_not_speed():
    steady, stutter = moving([2] * 8), moving([0, 4] * 4)
    noise = np.random.default_rng(0).integers(0, 256, steady.shape).astype(np.uint8)
    smooth, jerky, random, still = score("motion_smoothness", steady, stutter, noise, moving([0] * 8))
    assert still == 1.0 and smooth > 0.99 and random < 0.85
    assert 1 - jerky > 4 * (1 - smooth)


def test_flicker_sees_brightness_jumps_and_not_motion():
    steady = moving([2] * 7)
    jumps = (steady.astype(int) + 30 * (np.arange(8) % 2)[:, None, None, None]).clip(0, 255).astype(np.uint8)
    calm, flickers = score("flicker", steady, jumps)
    assert calm > 0.985 and flickers < calm - 0.03
    plain = score("flicker", steady, compensate=False)[0]
    grey = grey_frames(steady, 64)
    assert plain == pytest.approx(1 - np.abs(np.diff(grey, axis=0)).mean() / 255, abs=1e-4)  # VBench's definition
    assert plain < calm - 0.02


def test_a_spoilt_middle_costs_smoothness():
    spoilt = moving([1] * 8)
    spoilt[4] = 255 - spoilt[4]
    good, bad = score("motion_smoothness", moving([1] * 8), spoilt)
    assert bad < good - 0.04


@pytest.mark.parametrize("name, least", [("motion_dynamics", 2), ("motion_smoothness", 3), ("flicker", 2)])
def test_short_clips_are_reward_errors(name, least):
    with pytest.raises(RewardError, match=f"at least {least} frames, got {least - 1}"):
        score(name, moving([1] * 8)[: least - 1])
    assert np.isfinite(score(name, moving([1] * 8)[:least])).all()
    with pytest.raises(RewardError, match="fps"):
        score(name, moving([1] * 3), fps=0.0)
    with pytest.raises(ConfigError, match="short_side"):
        score(name, moving([1] * 3), short_side=4)


# ------------------------------------------------------------------------------------------ wrappers


def bright(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def bright(frames, prompt, gain=1.0):\n    return frames.mean() * gain\n")
    return f"{path}:bright"


def levels(*values):
    frames = np.zeros((len(values), 4, 4, 4, 3), np.uint8)
    return Media(frames=frames + np.asarray(values, np.uint8)[..., None, None, None], fps=8.0)


def run(scorer, args, media):
    prompts = [PromptItem(index=0, text="") for _ in media.frames]
    cfg = RewardConfig(scorer=scorer, args=args, segments=SegmentsConfig(attenuation=0.0))
    return build_reward("w", cfg).run(media, prompts, 0)


def test_binary_thresholds_the_take_not_its_frames(tmp_path):
    media = levels([0, 0, 200, 200], [90, 90, 90, 90], [0, 0, 0, 200])
    result = run("binary", {"scorer": bright(tmp_path), "threshold": 95}, media)
    assert result.values.tolist() == [1, 0, 0]
    np.testing.assert_allclose(result.parts["raw"], [100, 90, 50], rtol=1e-5)
    exactly = run("binary", {"scorer": bright(tmp_path), "threshold": 90}, media)
    assert exactly.values.tolist() == [1, 0, 0]  # above, not at


def test_scaled_shifts_scales_and_clips(tmp_path):
    args = {"scorer": bright(tmp_path), "args": {"gain": 2}, "shift": 100, "scale": 50, "low": -1, "high": 1.5}
    result = run("scaled", args, levels([0] * 4, [60] * 4, [70] * 4, [250] * 4))
    np.testing.assert_allclose(result.values, [-1, 0.4, 0.8, 1.5], rtol=1e-5)
    nested = {"scorer": "scaled", "args": args, "threshold": 0.5}
    assert run("binary", nested, levels([60] * 4, [70] * 4)).values.tolist() == [0, 1]


def test_wrappers_read_what_the_wrapped_scorer_reads():
    inner = {"scorer": "motion_dynamics", "threshold": 0.05}
    runner = build_reward("w", RewardConfig(scorer="binary", args=inner))
    assert runner.scorer.reads == "video"


@pytest.mark.parametrize(
    "scorer, args, message",
    [
        ("binary", {"scorer": "jpeg_compresibility", "threshold": 1}, "did you mean jpeg_comp"),
        ("binary", {"scorer": "flicker", "args": {"compensat": True}, "threshold": 1}, "did you mean compensate"),
        ("binary", {"scorer": "flicker"}, "threshold: binary needs this option"),
        ("binary", {"scorer": 3, "threshold": 1}, "expected a scorer's name"),
    ],
)
def test_wrong_wrapped_scorers_are_found_before_anything_loads(scorer, args, message):
    with pytest.raises(ConfigError, match=message):
        check_reward("w", RewardConfig(scorer=scorer, args=args))


@pytest.mark.parametrize("args", [{"scale": 0}, {"low": 2, "high": 1}, {"shift": float("nan")}])
def test_wrong_scaling_is_a_config_error(args):
    with pytest.raises(ConfigError, match="rewards.w"):
        build_reward("w", RewardConfig(scorer="scaled", args={"scorer": "flicker", **args}))
