"""Segments and temporal attenuation against worked numbers, JPEG size, the user's own functions, failures."""

import inspect
import math

import numpy as np
import pytest

from pipeline.config.sections.rewards import RewardConfig, SegmentsConfig
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.base import REGISTRY, Scorer
from pipeline.rewards.registry import list_scorers, scorer_class
from pipeline.rewards.runner import RewardRunner, build_reward, check_reward
from pipeline.rewards.scorers.jpeg import jpeg_kilobytes
from pipeline.rewards.segments import combine, log_weights, pick_frames, segment_bounds


class Brightness(Scorer):
    """Mean pixel of the one frame it gets; counts its calls."""

    reads = "frame"

    def __init__(self):
        self.batches = []

    def score(self, media, prompts):
        assert media.frames.shape[1] == 1 and len(prompts) == len(media.frames)
        self.batches.append(len(prompts))
        mean = media.frames.mean(axis=(1, 2, 3, 4))
        return {"score": mean, "odd": np.where(mean > 50, mean, np.nan)}


def runner(scorer=None, **segments):
    cfg = RewardConfig(scorer="brightness", segments=SegmentsConfig(**segments))
    return RewardRunner("bright", cfg, scorer or Brightness())


def clip(values, takes=1):
    """Frames of constant brightness `values` [F]."""
    frames = np.zeros((takes, len(values), 4, 4, 3), np.uint8)
    frames += np.asarray(values, np.uint8)[None, :, None, None, None]
    return Media(frames=frames, fps=8.0)


def prompts(n=1):
    return [PromptItem(index=i, text="a") for i in range(n)]


# The table of the InstructVideo section (F = 16, lambda = 1): weight of each frame, mean weight of each segment.
TABLE = [.0003, .0009, .0025, .0067, .018, .05, .135, .368, 1, .368, .135, .05, .018, .0067, .0025, .0009]  # fmt: skip


def test_weights_are_the_papers():
    weights = np.exp(log_weights(np.arange(16), 16, 1.0))
    np.testing.assert_allclose(weights, TABLE, rtol=0.1, atol=5e-5)
    assert weights.argmax() == 8 and weights[8] == 1.0
    means = [weights[a:b].mean() for a, b in segment_bounds(16, 4)]
    np.testing.assert_allclose(means, [0.0026, 0.143, 0.388, 0.0071], atol=6e-4)
    assert weights.mean() == pytest.approx(0.135, abs=1e-3)


def test_lambda_is_rescaled_with_the_clip():
    for frames in (16, 32, 80, 160):
        middle, quarter = frames // 2, frames // 4
        weight = np.exp(log_weights(np.array([middle, quarter]), frames, 1.0))
        assert weight[0] == 1.0 and weight[1] == pytest.approx(math.exp(-4))  # the same moment, the same weight


def test_unnormalised_score_is_the_formula():
    """R = (1/S) sum f(g) r(g) by hand: centres 2, 6, 10, 14 of 16 frames."""
    result = runner(normalize=False).run(clip(range(0, 160, 10)), prompts(), None)
    assert result.segment_frames.tolist() == [[2], [6], [10], [14]]
    by_hand = (math.exp(-6) * 20 + math.exp(-2) * 60 + math.exp(-2) * 100 + math.exp(-6) * 140) / 4
    assert result.values[0] == pytest.approx(by_hand, rel=1e-5)
    np.testing.assert_allclose(result.segment_weights, np.exp([-6, -2, -2, -6]), rtol=1e-5)
    np.testing.assert_allclose(result.segment_values, [[20, 60, 100, 140]])


def test_normalised_score_keeps_the_scale():
    result = runner().run(clip([77] * 16), prompts(), 5)
    assert result.values[0] == pytest.approx(77) and result.segment_weights.sum() == pytest.approx(1)
    weights = np.exp([-6, -2, -2, -6])
    values = runner().run(clip(range(0, 160, 10)), prompts(), None).values
    assert values[0] == pytest.approx((weights * [20, 60, 100, 140]).sum() / weights.sum(), rel=1e-5)


def test_lambda_zero_is_the_plain_segmental_mean():
    result = runner(attenuation=0.0).run(clip(range(0, 160, 10)), prompts(), None)
    assert result.values[0] == pytest.approx(80) and np.allclose(result.segment_weights, 0.25)


@pytest.mark.parametrize("frames", [16, 40])
def test_a_spoilt_middle_costs_more_than_a_spoilt_end(frames):
    good = np.full(frames, 200)
    middle, end = good.copy(), good.copy()
    middle[frames // 4 : 3 * frames // 4] = 0  # segments 2 and 3 of 4
    end[3 * frames // 4 :] = 0  # segment 4
    base, bad_middle, bad_end = (runner().run(clip(v), prompts(), None).values[0] for v in (good, middle, end))
    assert base == pytest.approx(200)
    assert bad_middle < 0.05 * base and bad_end > 0.95 * base
    plain = runner(attenuation=0.0)
    assert plain.run(clip(middle), prompts(), None).values[0] == pytest.approx(100)
    assert plain.run(clip(end), prompts(), None).values[0] == pytest.approx(150)


def spoilt(frames, start, stop):
    """A clip of brightness 200 that is black from `start` to `stop`."""
    values = np.full(frames, 200)
    values[start:stop] = 0
    return clip(values)


@pytest.mark.parametrize("frames", [16, 48])
def test_aggregations_on_a_spoilt_middle_and_a_spoilt_end(frames):
    """The worst segment finds damage wherever it is; the best half never does; the attenuated mean, in the middle."""
    quarter = frames // 4
    middle, end = spoilt(frames, quarter, 3 * quarter), spoilt(frames, 3 * quarter, frames)
    values = {
        aggregate: [runner(aggregate=aggregate).run(media, prompts(), None).values[0] for media in (middle, end)]
        for aggregate in ("mean", "min", 0.5)
    }
    assert values["mean"][0] < 10 and values["mean"][1] > 190
    assert values["min"] == [0, 0]
    assert values[0.5] == pytest.approx([200, 200])
    three = runner(aggregate=0.75)  # three of four segments: one of the spoilt middle has to be taken
    assert three.run(middle, prompts(), None).values[0] < 10 < 199 < three.run(end, prompts(), None).values[0]


def test_the_best_share_is_the_attenuated_mean_of_those_segments():
    """Centres 2, 6, 10, 14 of 16 with weights e^-6, e^-2, e^-2, e^-6; the best two are the third and the first."""
    values = np.zeros(16)
    values[[2, 6, 10, 14]] = 100, 10, 200, 50
    result = runner(aggregate=0.5).run(clip(values), prompts(), None)
    by_hand = (math.exp(-6) * 100 + math.exp(-2) * 200) / (math.exp(-6) + math.exp(-2))
    assert result.values[0] == pytest.approx(by_hand, rel=1e-5)
    assert result.segment_weights.shape == (1, 4) and (result.segment_weights[0] > 0).tolist() == [True, False] * 2
    raw = runner(aggregate=0.5, normalize=False).run(clip(values), prompts(), None)
    assert raw.values[0] == pytest.approx((math.exp(-6) * 100 + math.exp(-2) * 200) / 2, rel=1e-5)
    worst = runner(aggregate="min", normalize=False).run(clip(values), prompts(), None)
    assert worst.values[0] == pytest.approx(math.exp(-2) * 10, rel=1e-5)


@pytest.mark.parametrize("attenuation", [0.0, 1.0, 1e4])
def test_the_whole_share_is_the_mean_and_shares_are_ordered(attenuation):
    media = clip(np.random.default_rng(0).integers(0, 256, 24), takes=3)
    options = {"attenuation": attenuation, "count": 6}
    scores = {a: runner(aggregate=a, **options).run(media, prompts(3), 2).values for a in ("mean", "min", 1.0, 1 / 6)}
    np.testing.assert_allclose(scores["mean"], scores[1.0], rtol=1e-5)
    segments = runner(**options).run(media, prompts(3), 2).segment_values
    np.testing.assert_allclose(scores["min"], segments.min(axis=1))
    np.testing.assert_allclose(scores[1 / 6], segments.max(axis=1))  # ceil(6 / 6) segments, whatever their weight
    assert (scores["min"] <= scores["mean"]).all() and (scores["mean"] <= scores[1 / 6]).all()


def test_attenuation_falls_off_from_the_middle_and_follows_the_clips_length():
    weights = np.exp(log_weights(np.array([8, 7, 6, 2]), 16, 1.0))
    np.testing.assert_allclose(weights, np.exp([0, -1, -2, -6]))
    wide = runner(attenuation=0.25, normalize=False).run(clip([100] * 16), prompts(), None)
    np.testing.assert_allclose(wide.segment_weights, np.exp([-1.5, -0.5, -0.5, -1.5]), rtol=1e-5)
    rescaled = np.exp(log_weights(np.array([40, 20]), 80, 1.0))  # the same moments of a longer clip
    np.testing.assert_allclose(rescaled, np.exp([0, -4]))


def test_takes_of_a_group_choose_their_own_segments():
    ramp = np.arange(0, 160, 10)
    media = Media(frames=np.concatenate([clip(ramp).frames, clip(ramp[::-1]).frames]), fps=8.0)
    result = runner(aggregate="min").run(media, prompts(2), None)
    assert result.values.tolist() == [20, 10] and result.segment_weights.argmax(axis=1).tolist() == [0, 3]


def test_several_frames_a_segment():
    """R = (1/S) sum_s (1/n) sum_j f r, each frame scored once in one call."""
    scorer = Brightness()
    values = np.arange(16) * 10
    result = runner(scorer, frames=2, normalize=False).run(clip(values), prompts(), 3)
    assert scorer.batches == [8] and result.segment_frames.shape == (4, 2)
    weights = np.exp(log_weights(result.segment_frames, 16, 1.0))
    assert result.values[0] == pytest.approx((weights * values[result.segment_frames]).mean(), rel=1e-5)


def test_random_picks_stay_in_their_segments_differ_by_seed_and_are_shared_by_the_group():
    seen = [pick_frames(16, 4, 1, seed)[:, 0] for seed in range(300)]
    for s, (start, end) in enumerate(segment_bounds(16, 4)):
        assert {int(p[s]) for p in seen} == set(range(start, end))  # every frame can be picked
    assert np.array_equal(pick_frames(16, 4, 2, 7), pick_frames(16, 4, 2, 7))
    ramp = clip(range(0, 160, 10), takes=5)
    result = runner().run(ramp, prompts(5), 11)
    assert np.ptp(result.values) == 0 and result.segment_frames.shape == (4, 1)
    assert (result.segment_values == result.segment_values[0]).all()


def test_every_frame_is_scored_with_its_own_takes_prompt():
    class Index(Scorer):
        reads = "frame"

        def score(self, media, prompts):
            return [p.index + 100 * f.mean() for p, f in zip(prompts, media.frames, strict=True)]

    media = Media(frames=np.concatenate([clip([1] * 8).frames, clip([2] * 8).frames]), fps=8.0)
    assert runner(Index(), frames=2).run(media, prompts(2), 0).values.tolist() == [100, 201]


@pytest.mark.parametrize("frames, segments, n", [(1, 4, 1), (2, 4, 3), (3, 4, 1), (9, 4, 1), (9, 4, 5), (81, 4, 2)])
def test_short_and_odd_clips(frames, segments, n):
    bounds = segment_bounds(frames, segments)
    assert bounds[0][0] == 0 and bounds[-1][1] == frames and all(a < b for a, b in bounds)
    for seed in (None, 0):
        picks = pick_frames(frames, segments, n, seed)
        assert len(picks) == min(frames, segments) and picks.shape[1] >= 1
        assert all(a <= i < b for (a, b), row in zip(bounds, picks, strict=True) for i in row)
        assert all(len(set(row.tolist())) == len(row) for row in picks)


def test_strong_attenuation_does_not_underflow_to_nan():
    result = runner(attenuation=1e4).run(clip(range(0, 160, 10)), prompts(), None)
    assert np.isfinite(result.values).all() and result.values[0] == pytest.approx(80)  # frames 6 and 10, equally


def test_parts_that_do_not_apply_are_left_out():
    result = runner().run(clip(range(0, 160, 10)), prompts(), None)
    weights = np.exp([-2, -2, -6])
    assert result.parts["odd"][0] == pytest.approx((weights * [60, 100, 140]).sum() / weights.sum(), rel=1e-5)
    picks = np.array([[2], [6]])
    assert np.isnan(combine(np.full((1, 2, 1), np.nan), picks, 16, 1.0, False)[0][0])


def test_pictures_are_scored_directly():
    result = runner().run(clip([100], takes=3), prompts(3), 1)
    assert result.values.tolist() == [100, 100, 100] and result.segment_values is None


# ----------------------------------------------------------------------------------------------- JPEG


def test_jpeg_size_orders_pictures_and_has_the_stated_unit():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    flat = np.full((64, 64, 3), 128, np.uint8)
    media = Media(frames=np.stack([noise, flat])[:, None], fps=1)
    less = build_reward("c", RewardConfig(scorer="jpeg_compressibility")).run(media, prompts(2), None).values
    more = build_reward("i", RewardConfig(scorer="jpeg_incompressibility", args={"scale": 2})).run(
        media, prompts(2), None
    )
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=95)
    assert less[0] == pytest.approx(-len(buffer.getvalue()) / 1000) and less[1] > less[0]
    np.testing.assert_allclose(more.values, -less / 2)
    assert jpeg_kilobytes(noise, 50) < jpeg_kilobytes(noise, 95)


# ------------------------------------------------------------------------------- names, options, own files


def test_the_list_says_what_each_scorer_was_tested_with():
    for row in list_scorers():
        options = inspect.signature(scorer_class(row.name).__init__).parameters
        uses_a_model = {"model", "weights", "head", "embedder"} & set(options) or row.name in ("http", "ocr", "safety")
        assert (row.tested_with != "no model") == bool(uses_a_model), row.name


def test_registry_lists_and_suggests():
    assert {"jpeg_compressibility", "jpeg_incompressibility"} <= {row.name for row in list_scorers()}
    with pytest.raises(ConfigError, match=r"rewards\.x: unknown scorer 'jpeg_compresibility'; did you mean jpeg_comp"):
        check_reward("x", RewardConfig(scorer="jpeg_compresibility"))
    with pytest.raises(ConfigError, match=r"rewards\.x\.args\.qualty: .*did you mean quality\?"):
        check_reward("x", RewardConfig(scorer="jpeg_compressibility", args={"qualty": 3}))
    with pytest.raises(ConfigError, match=r"rewards\.x: quality: found 300"):
        build_reward("x", RewardConfig(scorer="jpeg_compressibility", args={"quality": 300}))


def own(tmp_path, source, name="score", **args):
    path = tmp_path / "mine.py"
    path.write_text(source)
    return build_reward("mine", RewardConfig(scorer=f"{path}:{name}", args=args))


def test_own_function_in_three_lines(tmp_path):
    source = "def score(frames, prompt):\n    assert frames.shape[0] == 1\n    return frames.mean() + len(prompt)\n"
    result = own(tmp_path, source).run(clip([10] * 16, takes=2), prompts(2), 0)
    np.testing.assert_allclose(result.values, [11, 11])
    assert result.segment_values.shape == (2, 4)


def test_own_function_with_metadata_options_video_and_batches(tmp_path):
    source = (
        "def score(frames, prompt, metadata, fps, gain=1):\n    return frames.shape[0] * gain + metadata['n'] + fps\n"
        "score.reads = 'video'\n"
        "def batch(frames, prompts, metadata):\n    return [f.mean() + m['n'] for f, m in zip(frames, metadata)]\n"
        "batch.batched = True\n"
    )
    items = [PromptItem(index=i, text="a", metadata={"n": i}) for i in range(2)]
    result = own(tmp_path, source, gain=100).run(clip([10] * 16, takes=2), items, 0)
    assert result.values.tolist() == [1608, 1609] and result.segment_values is None
    assert own(tmp_path, source, "batch").run(clip([10], takes=2), items, None).values.tolist() == [10, 11]


@pytest.mark.parametrize(
    "source, name, parts",
    [
        ("def score(frames, prompt)\n    return 1\n", "score", ["mine.py:1", "syntax error"]),
        ("def scores(frames, prompt):\n    return 1\n", "score", ["no function 'score'", "did you mean scores?"]),
        ("import nothing_such\n", "score", ["mine.py:1", "nothing_such"]),
        ("def score(frames):\n    return 1\n", "score", ["(frames, prompt)"]),
        ("def score(frames, prompt, more):\n    return 1\n", "score", ["'more' has no default"]),
        ("def score(frames, prompt):\n    return 1\nscore.reads = 'clip'\n", "score", ["'frame' or 'video'"]),
    ],
)
def test_wrong_own_files_are_config_errors(tmp_path, source, name, parts):
    with pytest.raises(ConfigError) as caught:
        own(tmp_path, source, name)
    for part in ["rewards.mine", *parts]:
        assert part in str(caught.value)


def test_missing_own_file_and_unknown_option(tmp_path):
    with pytest.raises(ConfigError, match=r"rewards\.m: .*not_there\.py is not there"):
        build_reward("m", RewardConfig(scorer="not_there.py:score"))
    with pytest.raises(ConfigError, match="unknown option 'gian'; did you mean gain"):
        own(tmp_path, "def score(frames, prompt, gain=1):\n    return 1\n", gian=2)


@pytest.mark.parametrize(
    "body, parts",
    [
        ("raise ValueError('no face found')", ["ValueError", "no face found", "mine.py, line 2"]),
        ("return float('nan')", ["NaN"]),
        ("return [1, 2]", ["instead of one number"]),
        ("return None", ["instead of one number"]),
        ("return 'good'", ["instead of one number"]),
    ],
)
def test_a_failing_reward_is_never_a_score(tmp_path, body, parts):
    with pytest.raises(RewardError) as caught:
        own(tmp_path, f"def score(frames, prompt):\n    {body}\n").run(clip([10], takes=2), prompts(2), 0)
    for part in ["reward mine", *parts]:
        assert part in str(caught.value), caught.value


@pytest.mark.parametrize("output", [[1.0], [[1.0, 2.0]], 5.0, {"values": [1, 2]}, {"score": [1, 2], "part": [1]}])
def test_wrong_length_is_refused(output):
    class Wrong(Scorer):
        reads = "video"

        def score(self, media, prompts):
            return output

    with pytest.raises(RewardError, match="reward bright"):
        runner(Wrong()).run(clip([1, 2], takes=2), prompts(2), 0)


def test_wrong_number_of_prompts_is_refused():
    with pytest.raises(RewardError, match="1 prompts for 2 takes"):
        runner().run(clip([1], takes=2), prompts(1), 0)


def test_registry_is_not_polluted():
    assert "brightness" not in REGISTRY
