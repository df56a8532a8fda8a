"""The scene grammar, its split and its drawings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.rewards.models import scene_world
from pipeline.rewards.models.scene_world import Scene, caption, parse_caption

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts"


def test_every_scene_survives_the_round_trip_through_its_caption():
    everything = scene_world.all_image_scenes() + scene_world.all_video_scenes()
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
    everything = scene_world.all_image_scenes() + scene_world.all_video_scenes()
    assert {word for scene in everything for word in caption(scene).split()} == set(scene_world.vocabulary())


def test_split_is_disjoint_down_to_the_compositions():
    for train, held in (
        (scene_world.image_prompts(False), scene_world.image_prompts(True)),
        (scene_world.video_prompts(False), scene_world.video_prompts(True)),
    ):
        assert not set(train) & set(held)
        assert not any(pair in scene_world.HELD_OUT for text in train for pair in parse_caption(text).pairs)
        assert all(any(pair in scene_world.HELD_OUT for pair in parse_caption(text).pairs) for text in held)


def test_a_fifth_is_held_out_and_no_word_is():
    pairs = len(scene_world.PALETTE) * len(scene_world.SHAPES)
    assert 0.15 < len(scene_world.HELD_OUT) / pairs < 0.25
    kept = [parse_caption(text) for text in scene_world.image_prompts(False)]
    assert {scene.colour for scene in kept} == set(scene_world.PALETTE)
    assert {scene.shape for scene in kept} == set(scene_world.SHAPES)


def test_prompt_files_hold_the_prompts_of_the_code():
    for name, lines in scene_world.prompt_files().items():
        assert (PROMPTS / name).read_text() == "\n".join(lines) + "\n", f"{name} is stale"
    assert len(scene_world.image_prompts(True)) >= 96
    assert len(scene_world.video_prompts(True)) == 40


def test_training_data_never_holds_a_held_out_composition():
    rng = np.random.default_rng(0)
    for video in (False, True):
        for _ in range(300):
            scene = scene_world.sample_scene(rng, video=video)
            assert not scene_world.is_held_out(scene)
            assert not scene_world.is_held_out(parse_caption(scene_world.wrong_caption(scene, rng, p=0.8)))


def test_wrong_captions_come_at_the_rate_asked_for():
    rng = np.random.default_rng(1)
    drawn = [scene_world.sample_scene(rng) for _ in range(2000)]
    share = np.mean([scene_world.wrong_caption(scene, rng, p=0.35) != caption(scene) for scene in drawn])
    assert 0.31 < share < 0.39
    assert all(scene_world.wrong_caption(scene, rng, p=0.0) == caption(scene) for scene in drawn[:50])
    assert all(scene_world.wrong_caption(scene, rng, p=1.0) != caption(scene) for scene in drawn[:50])


def test_drawings_are_deterministic_and_of_the_stated_size():
    image, clip = Scene("red", "cross", count=3), Scene("cyan", "circle", direction="up", speed="quickly")
    first, again = (scene_world.draw_image(image, np.random.default_rng(5)) for _ in range(2))
    assert first.dtype == np.uint8 and first.shape == (48, 48, 3) and np.array_equal(first, again)
    video = scene_world.draw_video(clip, np.random.default_rng(5))
    assert video.dtype == np.uint8 and video.shape == (9, 48, 48, 3)
