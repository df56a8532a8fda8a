"""The table of takes: rows are appended, media lie beside it, scores keep their segments."""

import numpy as np

from pipeline.core.takes_table import read_takes, save_takes
from pipeline.core.types import Media, PromptItem, RewardScores


def test_save_takes_appends_rows_and_media(tmp_path):
    media = Media(frames=np.random.default_rng(0).integers(0, 256, (2, 9, 48, 48, 3), dtype=np.uint8), fps=8.0)
    prompts = [PromptItem(index=0, text="a"), PromptItem(index=1, text="b")]
    scores = {
        "x": RewardScores(
            values=np.array([1.0, 2.0], np.float32),
            segment_values=np.array([[1, 2], [3, 4]], np.float32),
            segment_weights=np.array([0.25, 0.75], np.float32),
            segment_frames=np.array([[1], [6]]),
        ),
        "y": RewardScores(values=np.array([10.0, 20.0], np.float32)),
    }
    weights = {"x": 2.0, "y": 0.5}
    paths = save_takes(tmp_path, media, prompts, [5, 6], 3, scores, step=4, weights=weights, keep=[True, False])
    save_takes(tmp_path, media, prompts, [7, 8], 3, scores, step=4, weights=weights)
    rows = read_takes(tmp_path)
    assert [(r["prompt"], r["prompt_index"], r["take"], r["seed"]) for r in rows] == [
        ("a", 0, 0, 5), ("b", 1, 0, 6), ("a", 0, 1, 7), ("b", 1, 1, 8),
    ]  # fmt: skip
    assert rows[0]["reward"] == 7.0 and rows[1]["reward/y"] == 20.0 and rows[0]["version"] == 3 and rows[0]["step"] == 4
    assert rows[1]["path"] is None and paths[1] is None and (tmp_path / rows[0]["path"]).is_file()
    assert rows[1]["segments/x"] == [3.0, 4.0] and rows[0]["segment_frames/x"] == [[1], [6]]
    assert rows[0]["segment_weights/x"] == [0.25, 0.75]


def test_takes_that_were_not_scored_have_no_reward_and_those_that_no_reward_applies_to_have_none(tmp_path):
    """0.0 would be a score."""
    prompts = [PromptItem(index=0, text="a")]
    save_takes(tmp_path / "generated", None, prompts, [5], 0, {})
    assert not any(column.startswith("reward") for column in read_takes(tmp_path / "generated")[0])
    save_takes(tmp_path / "scored", None, prompts, [5], 0, {"x": RewardScores(values=np.array([np.nan], np.float32))})
    assert read_takes(tmp_path / "scored")[0]["reward"] is None
