"""Several groups in one call of a scorer, and poison that fails its own group only."""

import traceback

import numpy as np
import pytest
from http_server import items

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import RewardError, RewardUnavailable
from pipeline.core.types import Media
from pipeline.rewards.base import Scorer
from pipeline.rewards.batching import Takes, score_groups
from pipeline.rewards.runner import RewardRunner


class Brightness(Scorer):
    """Mean level; raises on pictures of `poison`; remembers how many pictures each call held."""

    reads = "frame"

    def __init__(self, poison=255, error=ValueError):
        self.poison, self.error, self.calls = poison, error, []

    def score(self, media, prompts):
        self.calls.append(len(prompts))
        levels = media.frames.reshape(len(prompts), -1).mean(1)
        if (levels == self.poison).any():
            raise self.error("cannot look at that")
        return {"score": levels, "words": np.asarray([len(p.text.split()) for p in prompts])}


def runner(scorer):
    return RewardRunner("r", RewardConfig(scorer="jpeg_compressibility"), scorer)


def group(*levels, frames=1, size=4, seed=None, fps=8.0):
    pixels = np.zeros((len(levels), frames, size, size, 3), np.uint8)
    pixels += np.asarray(levels, np.uint8)[:, None, None, None, None]
    pixels[:, :, 0, 0, 0] += np.arange(frames, dtype=np.uint8)[None]  # frames differ, so picks show
    return Takes(Media(frames=pixels, fps=fps), items(*["a b"] * len(levels)), seed)


def same(got, expected):
    for name in ("values", "segment_values", "segment_weights", "segment_frames"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None and b is None) or np.array_equal(a, b), name
    assert got.parts.keys() == expected.parts.keys()
    assert all(np.array_equal(got.parts[k], expected.parts[k]) for k in got.parts)


def test_groups_share_calls_and_get_what_they_would_get_alone():
    groups = [group(10, 20, seed=1, frames=8), group(30, seed=2, frames=8), group(40, 50, 60, frames=1)]
    scorer = Brightness()
    outcomes = score_groups(runner(scorer), groups)
    assert scorer.calls == [2 * 4 + 4 + 3]  # clips as four frames each, and pictures, in one call
    for got, takes in zip(outcomes, groups, strict=True):
        same(got, runner(Brightness()).run(takes.media, takes.prompts, takes.seed))


def test_other_sizes_and_rates_get_calls_of_their_own():
    scorer = Brightness()
    outcomes = score_groups(runner(scorer), [group(1), group(2, size=6), group(3, 4), group(5, fps=24.0)])
    assert sorted(scorer.calls) == [1, 1, 3]
    assert [o.values.round().tolist() for o in outcomes] == [[1], [2], [3, 4], [5]]


def test_a_poisonous_take_fails_its_group_by_name_and_nothing_else():
    scorer = Brightness()
    groups = [group(10, 20), group(1, 2, 3, 255, 5, 6, 7, 8), group(30, 40), group(50, 60)]
    outcomes = score_groups(runner(scorer), groups)
    assert [o.values.tolist() for o in (outcomes[0], *outcomes[2:])] == [[10, 20], [30, 40], [50, 60]]
    assert isinstance(outcomes[1], RewardError)
    text = "reward r: take 3: jpeg_compressibility raised ValueError: cannot look at that"
    assert str(outcomes[1]).startswith(text)
    assert "Traceback" in "".join(traceback.format_exception(outcomes[1]))  # for the server's log
    # all; its half; [10, 20] and the poisonous group alone; then its takes in halves of 4, 2 and 1; the other half
    assert len(scorer.calls) <= 1 + 2 + 2 + 6


def test_nan_of_one_clip_names_the_take_not_the_frame():
    class Nan(Brightness):
        def score(self, media, prompts):
            levels = media.frames.reshape(len(prompts), -1).mean(1)
            return np.where(levels > 200, np.nan, levels)

    outcomes = score_groups(runner(Nan()), [group(10, 20, 250, frames=8), group(30, frames=8)])
    assert str(outcomes[0]).startswith("reward r: take 2: returned NaN or infinity for 4 of 4 pictures or clips")
    assert outcomes[1].values.shape == (1,)


def test_a_server_that_is_down_is_asked_once():
    scorer = Brightness(poison=20, error=RewardUnavailable)
    outcomes = score_groups(runner(scorer), [group(10, 11), group(20, 21), group(30, 31)])
    assert scorer.calls == [6] and all(isinstance(o, RewardUnavailable) for o in outcomes)


def test_relative_scorers_see_whole_groups():
    scorer = Brightness(poison=40)
    scorer.relative = True
    outcomes = score_groups(runner(scorer), [group(10, 20), group(30, 40, 50)])
    assert scorer.calls == [2, 3] and "take" not in str(outcomes[1])


def test_a_bug_outside_the_scorer_is_raised_and_does_not_hang(monkeypatch):
    broken = runner(Brightness())
    monkeypatch.setattr("pipeline.rewards.runner.check_output", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_groups(broken, [group(1), group(2)])


def test_segments_resize_each_chosen_frame_once_and_no_other(tmp_path, monkeypatch):
    import tiny_rewards

    from pipeline.rewards.models import clip
    from pipeline.rewards.runner import build_reward

    folder = tiny_rewards.clip(tmp_path / "clip")
    scorer = build_reward("r", RewardConfig(scorer="clip_score", args={"model": str(folder), "batch": 3}))
    resized, plain = [], clip.preprocess

    def counted(frames, *args, **kwargs):
        resized.extend(np.asarray(frames).reshape(len(frames), -1)[:, 0].tolist())
        return plain(frames, *args, **kwargs)

    monkeypatch.setattr(clip, "preprocess", counted)
    frames = np.zeros((2, 20, 40, 48, 3), np.uint8) + np.arange(40, dtype=np.uint8).reshape(2, 20, 1, 1, 1)
    result = scorer.run(Media(frames=frames, fps=8.0), items("a", "b"), 3)
    picks = result.segment_frames.reshape(-1)
    assert len(picks) == 4 and sorted(resized) == sorted([*picks, *(picks + 20)])


def test_a_file_is_decoded_once_for_all_its_rewards(tmp_path, monkeypatch):
    from jobs import cli
    from jobs.common import score_files
    from pipeline.core.media import encode_mp4

    (tmp_path / "clip.mp4").write_bytes(encode_mp4(np.zeros((6, 32, 32, 3), np.uint8), 8.0))
    decoded, plain = [], score_files.read_media
    monkeypatch.setattr(score_files, "read_media", lambda path: decoded.append(path) or plain(path))
    rewards = ["-r", "jpeg_compressibility", "-r", "jpeg_incompressibility", "-r", "flicker"]
    assert cli.main(["score", str(tmp_path / "clip.mp4"), *rewards, "--out", str(tmp_path / "scores.parquet")]) == 0
    assert len(decoded) == 1
