"""The clips in configs/prompts/video-clips and the pictures in image-pictures are those that the job draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jobs.shapes.clips import draw_clips
from pipeline.core.media import read_media
from pipeline.core.prompts import load_prompts
from pipeline.rewards.models import scene_world

FOLDER = Path(__file__).parents[2] / "configs/prompts/video-clips"


def test_there_is_a_right_clip_of_every_training_caption():
    rows = load_prompts(FOLDER)
    assert [row.text for row in rows] == scene_world.video_prompts(held_out=False)
    media, prompts = draw_clips(seed=0, per_caption=1)
    assert [prompt.text for prompt in prompts] == [row.text for row in rows]
    for k in (0, 77, 151):
        stored = read_media(Path(str(rows[k].clip)))
        assert stored.fps == media.fps
        assert np.abs(stored.frames[0].astype(int) - media.frames[k]).mean() < 2.0  # what h264 loses
    assert not np.array_equal(draw_clips(seed=1, per_caption=1)[0].frames, media.frames)


def test_there_is_a_right_picture_of_every_training_caption():
    rows = load_prompts(FOLDER.parent / "image-pictures")
    assert [row.text for row in rows] == scene_world.image_prompts(held_out=False)
    media, prompts = draw_clips(seed=0, per_caption=1, pictures=True)
    assert [prompt.text for prompt in prompts] == [row.text for row in rows]
    for k in (0, 77, 255):
        assert np.array_equal(read_media(Path(str(rows[k].clip))).frames[0], media.frames[k])
