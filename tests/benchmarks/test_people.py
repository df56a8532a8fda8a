"""The chain from a person's answers to a config that learns from them, with few takes; the run itself is a dry run."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from command import run

from benchmarks.browser import CHROMIUM
from benchmarks.learning import people
from pipeline.core.takes_table import save_takes
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.models import scene_world

PROMPTS = 12


@pytest.fixture
def takes(tmp_path):
    """Two takes of each prompt: one that shows it, and one that shows another."""
    rng = np.random.default_rng(0)
    scenes = [scene_world.sample_scene(rng) for _ in range(2 * PROMPTS)]
    for i in range(PROMPTS):
        shown = np.stack([scene_world.draw_image(scenes[k], rng) for k in (i, i + PROMPTS)])
        prompts = [PromptItem(index=i, text=scene_world.caption(scenes[i]))] * 2
        save_takes(tmp_path / "takes", Media(frames=shown[:, None], fps=1.0), prompts, [0, 1], 0, {})
    return tmp_path / "takes"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_answers_in_a_browser_become_a_reward_that_a_run_takes(takes, tmp_path, capsys, monkeypatch):
    def in_this_process(*args):
        status, out, err = run(capsys, *args)
        if status:
            raise RuntimeError(err)
        return out

    monkeypatch.setattr(people, "rushes", in_this_process)
    monkeypatch.chdir(people.ROOT)
    person = people.Person(errors=0.0, seed=0)
    printed = people.label(takes, PROMPTS, person, tmp_path / "profile")
    rows = pq.read_table(takes / "labels.parquet").to_pylist()
    assert person.answers == len(rows) == PROMPTS + 1 and "answers written to" in printed
    right = [row for row in rows if row["label"] != "tie"]
    assert len(right) >= PROMPTS - 3
    assert all(row[f"path_{row['label']}"].endswith("take-00.png") for row in right)  # the eyes are good
    fitted = people.fit(takes, tmp_path / "reward")
    assert fitted["pairs"] == PROMPTS and fitted["dropped"] == {"a repeat of an earlier answer": 1}
    plan = people.rushes("train", people.CONFIG, "--dry-run", *people.overrides(tmp_path / "reward", 2, 0))
    assert "people" in plan


def test_a_person_errs_as_often_as_told():
    frame = np.zeros((48, 48, 3), np.uint8)
    person = people.Person(errors=0.1, seed=0)
    keys = [person.key("a red circle", frame, frame) for _ in range(500)]
    assert person.answers == 500 and 30 < person.wrong < 75 and keys.count(" ") == 500 - person.wrong
