"""The scene checker is exact on drawn scenes and notices every single changed attribute."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from pipeline.core.errors import RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.models import scene_world
from pipeline.rewards.models.scene_world import Scene, caption
from pipeline.rewards.scorers.scene import MotionScorer, SceneScorer, check_image, check_motion, find_objects


def mean(credits: dict[str, float]) -> float:
    return float(np.mean(list(credits.values())))


def drawn_images(count: int, seed: int) -> list[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(seed)
    some = [scene_world.sample_scene(rng, held_out=bool(i % 2)) for i in range(count)]
    return [(scene, scene_world.draw_image(scene, rng)) for scene in some]


def test_drawn_images_score_one():
    right = [mean(check_image(image, caption(scene))) == 1.0 for scene, image in drawn_images(300, 0)]
    assert np.mean(right) > 0.995


def test_any_changed_attribute_of_an_image_costs_credit():
    rng = np.random.default_rng(1)
    for scene, image in drawn_images(120, 2):
        for name in scene_world.stated_attributes(scene):
            other = scene_world.changed(scene, name, rng)
            assert mean(check_image(image, caption(other))) < 1.0, (caption(scene), caption(other))


def test_the_changed_attribute_is_the_one_that_loses_credit():
    image = scene_world.draw_image(Scene("red", "circle", position="left"), np.random.default_rng(3))
    ones = {"colour": 1.0, "shape": 1.0, "count": 1.0, "position": 1.0}
    assert check_image(image, "a red circle at the left") == ones
    assert check_image(image, "a blue circle at the left") == ones | {"colour": 0.0}
    assert check_image(image, "a red cross at the left") == ones | {"shape": 0.0}
    assert check_image(image, "a red circle at the top") == ones | {"position": 0.0}
    assert check_image(image, "two red circles") == {"colour": 1.0, "shape": 1.0, "count": 0.5}


def test_relations_are_read_from_the_objects_named():
    scene = Scene("red", "circle", relation="above", other_colour="blue", other_shape="square")
    image = scene_world.draw_image(scene, np.random.default_rng(4))
    assert mean(check_image(image, "a red circle above a blue square")) == 1.0
    assert mean(check_image(image, "a blue square below a red circle")) == 1.0
    assert check_image(image, "a red circle below a blue square")["relation"] == 0.0
    assert check_image(image, "a red circle above a cyan square")["colour"] == 0.5


def test_clips_score_one_and_each_change_of_motion_is_seen():
    rng = np.random.default_rng(5)
    for i in range(60):
        scene = scene_world.sample_scene(rng, video=True, held_out=bool(i % 2))
        clip = scene_world.draw_video(scene, rng)
        assert check_motion(clip, caption(scene)) == {"direction": 1.0, "speed": 1.0}
        assert check_image(clip[4], caption(scene)) == {"colour": 1.0, "shape": 1.0, "count": 1.0}
        for name in ("direction", "speed"):
            assert check_motion(clip, caption(scene_world.changed(scene, name, rng)))[name] == 0.0


def test_a_still_clip_and_an_empty_one_have_no_motion():
    scene = Scene("red", "circle", direction="left", speed="slowly")
    clip = scene_world.draw_video(scene, np.random.default_rng(6))
    assert mean(check_motion(np.repeat(clip[:1], 9, axis=0), caption(scene))) == 0.0
    assert mean(check_motion(np.full_like(clip, 230), caption(scene))) == 0.0


def test_nothing_and_noise_have_no_credit():
    blank = np.full((48, 48, 3), 230, np.uint8)
    for text in ("a red circle at the left", "three red circles", "a red circle above a blue square"):
        assert mean(check_image(blank, text)) == 0.0
    noise = np.random.default_rng(7).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert mean(check_image(noise, "a red circle at the left")) < 0.5


def test_a_little_blur_and_noise_do_not_matter():
    rng = np.random.default_rng(8)
    right = []
    for scene, image in drawn_images(80, 9):
        soft = ndimage.gaussian_filter(image.astype(float), (0.6, 0.6, 0)) + rng.normal(0, 6, image.shape)
        right.append(mean(check_image(soft.round().clip(0, 255).astype(np.uint8), caption(scene))) == 1.0)
    assert np.mean(right) > 0.9


def test_a_smear_has_no_shape_and_a_rainbow_no_colour():
    frame = np.full((48, 48, 3), 230, np.uint8)
    frame[20:24, 4:44] = scene_world.PALETTE["red"]
    assert [(item.colour, item.shape) for item in find_objects(frame)] == [("red", None)]
    grey = np.full((48, 48, 3), 230, np.uint8)
    grey[12:30, 12:30] = 90
    assert [(item.colour, item.shape) for item in find_objects(grey)] == [(None, "square")]


def test_scorers_give_the_mean_credit_and_the_parts():
    rng = np.random.default_rng(10)
    still = Scene("green", "circle", count=2)
    moving = Scene("cyan", "cross", direction="down", speed="quickly")
    texts = [caption(still), "a green circle at the top"]
    prompts = [PromptItem(index=i, text=text) for i, text in enumerate(texts)]
    image = scene_world.draw_image(still, rng)
    out = SceneScorer().score(Media(frames=np.stack([image, image])[:, None], fps=8.0), prompts)
    assert out["score"].dtype == np.float32 and out["score"].shape == (2,)
    assert out["score"][0] == 1.0 and out["score"][1] < 1.0
    assert np.isnan(out["position"][0]) and not np.isnan(out["position"][1])
    clip = Media(frames=scene_world.draw_video(moving, rng)[None], fps=8.0)
    assert MotionScorer().score(clip, [PromptItem(index=0, text=caption(moving))])["score"].tolist() == [1.0]


def test_prompts_the_checker_cannot_judge_are_errors_not_scores():
    media = Media(frames=np.zeros((1, 9, 48, 48, 3), np.uint8), fps=8.0)
    with pytest.raises(RewardError, match="'elephant' is not a shape"):
        SceneScorer().score(media, [PromptItem(index=0, text="a red elephant")])
    with pytest.raises(RewardError, match="needs a caption with a motion"):
        MotionScorer().score(media, [PromptItem(index=0, text="a red circle")])
