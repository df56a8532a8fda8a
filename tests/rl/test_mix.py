"""Source mix: which groups are one's own takes and which are data, and what both teach together."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from labelled_table import SECTIONS, pictures, write_table
from scored_groups import scored

from pipeline.config.parts import SIGNALS
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError
from pipeline.rl.recipe import check_recipe
from pipeline.rl.signals.base import LABEL, labels_of
from pipeline.rl.sources import source_of

PARTS = {"signal": {"name": "select", "keep": 1}, "objective": {"name": "awm"}, "step": {"takes": 2}}


@pytest.fixture
def folder(tmp_path):
    for name, data in zip("abc", pictures(3), strict=True):
        (tmp_path / f"{name}.png").write_bytes(data)
        (tmp_path / f"{name}.txt").write_text(f"{name} red circle")
    return tmp_path


def config(folder, source=None, **sections):
    source = {"name": "mix", "own": 2, "data": 1, **(source or {})}
    return tiny.config(folder / "sd3", prompts={"train": folder}, source=source, **{**PARTS, **sections})


def test_every_third_group_is_data_and_counts_whole(folder):
    cfg = config(folder)
    check_recipe(cfg)
    source = source_of(cfg)
    row = source.rows(cfg)[1]
    works = [source.work(cfg, group, 0, row) for group in range(6)]
    assert [work.drawn for work in works] == [True, True, False, True, True, False]
    assert all(work.prompts[0].text == "b red circle" and not work.labels for work in works if work.drawn)
    data = works[2]
    assert data.labels == (1.0, 1.0) and len({prompt.clip for prompt in data.prompts}) == 2
    assert all(prompt.clip.endswith(f"{prompt.text[0]}.png") for prompt in data.prompts)
    assert data == source.work(cfg, 2, 0, row) and data.prompts != works[5].prompts or data.seeds != works[5].seeds
    assert works[0].prompts[0].clip is None  # the own takes do not begin at the clip


def test_labelled_takes_weigh_by_their_labels_and_own_ones_by_rank():
    state = SIGNALS.get("select")(keep=1).begin({"r": RewardConfig(scorer="x", normalize="running")})
    own, data, winner = scored(r=[1, 5]), scored(**{LABEL: [1, 1]}), scored(**{LABEL: [0, 1]})
    taught = [feedback.advantages.tolist() for feedback in state.step([data, own, winner]).feedback]
    assert taught == [[1, 1], [0, 2], [0, 2]]
    assert state.is_flat(scored(r=[2, 2])) and not state.is_flat(data)
    alone = SIGNALS.get("select")(keep=1).begin({"r": RewardConfig(scorer="x")}).step([own])
    assert np.array_equal(alone.feedback[0].advantages, [0, 2])
    assert state.step([data]).feedback[0].advantages.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"signal": {"name": "advantages"}}, "takes of source mix are judged by labels; set another signal"),
        ({"objective": {"name": "grpo"}}, "objective.name: grpo trains on what the policy drew, and source mix gives"),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder, sections, message):
    with pytest.raises(ConfigError, match=message):
        check_recipe(config(folder, **sections))


def test_the_better_take_of_a_pair_can_be_an_example(tmp_path):
    table = write_table(tmp_path)
    cfg = tiny.config(tmp_path / "sd3", prompts={"train": table}, source=SECTIONS["source"], **PARTS)
    check_recipe(cfg)
    work = source_of(cfg).work(cfg, 0, 0, source_of(cfg).rows(cfg)[1])
    (taught,) = SIGNALS.get("select")(keep=1).begin(cfg.rewards).step([labels_of(work)]).feedback
    assert taught.advantages.tolist() == [0, 2]
