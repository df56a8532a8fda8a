"""The scene grammar, its split and its drawings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline import scenes
from pipeline.scenes import Scene, caption, parse_caption

PROMPTS = Path(__file__).parent.parent / "configs" / "prompts"


def test_every_scene_survives_the_round_trip_through_its_caption():
    everything = scenes.all_image_scenes() + scenes.all_video_scenes()
    assert all(parse_caption(caption(scene)) == scene for scene in everything)
    assert len({caption(scene) for scene in everything}) == len(everything)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "expected at least"),
        ("four red circles", "must begin with"),
        ("a pink circle", "'pink' is not a colour"),
        ("a red star", "'star' is not a shape"),
        ("two red circle", "not a plural"),
        ("two red circles at the left", "nothing may follow"),
        ("a red circle at the middle", "not a position"),
        ("a red circle moving left fast", "not a position, a relation or a motion"),
        ("a red circle left of a red square", "differ in colour"),
        ("a red circle above blue square", "must follow 'above'"),
    ],
)
def test_text_outside_the_grammar_is_refused_with_the_reason(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_caption(text)


def test_vocabulary_covers_every_caption():
    everything = scenes.all_image_scenes() + scenes.all_video_scenes()
    assert {word for scene in everything for word in caption(scene).split()} == set(scenes.vocabulary())


def test_split_is_disjoint_down_to_the_compositions():
    for train, held in (
        (scenes.image_prompts(False), scenes.image_prompts(True)),
        (scenes.video_prompts(False), scenes.video_prompts(True)),
    ):
        assert not set(train) & set(held)
        assert not any(pair in scenes.HELD_OUT for text in train for pair in parse_caption(text).pairs)
        assert all(any(pair in scenes.HELD_OUT for pair in parse_caption(text).pairs) for text in held)


def test_a_fifth_is_held_out_and_no_word_is():
    pairs = len(scenes.PALETTE) * len(scenes.SHAPES)
    assert 0.15 < len(scenes.HELD_OUT) / pairs < 0.25
    kept = [parse_caption(text) for text in scenes.image_prompts(False)]
    assert {scene.colour for scene in kept} == set(scenes.PALETTE)
    assert {scene.shape for scene in kept} == set(scenes.SHAPES)


def test_prompt_files_are_what_the_code_writes(tmp_path):
    for fresh in scenes.write_prompt_files(tmp_path):
        assert fresh.read_text() == (PROMPTS / fresh.name).read_text(), f"{fresh.name} is stale"
    assert len(scenes.image_prompts(True)) >= 96
    assert len(scenes.video_prompts(True)) == 40


def test_training_data_never_holds_a_held_out_composition():
    rng = np.random.default_rng(0)
    for video in (False, True):
        for _ in range(300):
            scene = scenes.sample_scene(rng, video=video)
            assert not scenes.is_held_out(scene)
            assert not scenes.is_held_out(parse_caption(scenes.wrong_caption(scene, rng, p=0.8)))


def test_wrong_captions_come_at_the_rate_asked_for():
    rng = np.random.default_rng(1)
    drawn = [scenes.sample_scene(rng) for _ in range(2000)]
    share = np.mean([scenes.wrong_caption(scene, rng, p=0.35) != caption(scene) for scene in drawn])
    assert 0.31 < share < 0.39
    assert all(scenes.wrong_caption(scene, rng, p=0.0) == caption(scene) for scene in drawn[:50])
    assert all(scenes.wrong_caption(scene, rng, p=1.0) != caption(scene) for scene in drawn[:50])


def test_drawings_are_deterministic_and_of_the_stated_size():
    image, clip = Scene("red", "cross", count=3), Scene("cyan", "circle", direction="up", speed="quickly")
    first, again = (scenes.draw_image(image, np.random.default_rng(5)) for _ in range(2))
    assert first.dtype == np.uint8 and first.shape == (48, 48, 3) and np.array_equal(first, again)
    video = scenes.draw_video(clip, np.random.default_rng(5))
    assert video.dtype == np.uint8 and video.shape == (9, 48, 48, 3)
