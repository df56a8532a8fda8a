"""Source labelled: which rows of a table are pairs, what a group is, and what is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from labelled_table import SECTIONS, pictures, write_table

from pipeline.config.parts import SIGNALS
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.prompts import content_digest, load_prompts
from pipeline.core.types import GivenTake
from pipeline.rl.group_plan import steps_ahead
from pipeline.rl.recipe import check_recipe
from pipeline.rl.signals.base import labels_of
from pipeline.rl.sources import source_of
from pipeline.tools.preflight import check_prompts


def config(table: Path, **sections) -> Config:
    merged = {name: {**SECTIONS.get(name, {}), **sections.get(name, {})} for name in {**SECTIONS, **sections}}
    return tiny.config(table.parent / "sd3", prompts={"train": table}, **merged)


@pytest.fixture
def table(tmp_path) -> Path:
    return write_table(tmp_path / "data")


def test_a_group_is_a_pair_and_ties_are_left_out(table):
    cfg = config(table)
    check_recipe(cfg)
    source = source_of(cfg)
    rows = source.rows(cfg)
    assert [row.index for row in rows] == [0, 1, 3] and [row.text[0] for row in rows] == ["a", "b", "a"]
    work = source.work(cfg, 5, 1, rows[1])
    a, b = (str(table.parent / name) for name in ("a1.png", "b1.png"))
    assert rows[1].takes == (GivenTake(path=a, label=0.0), GivenTake(path=b, label=1.0))
    assert [prompt.clip for prompt in work.prompts] == [a, b] and work.labels == (0.0, 1.0) and work.takes == 2
    assert {prompt.text for prompt in work.prompts} == {"b blue square"} and not work.drawn
    assert work == source.work(cfg, 5, 1, rows[1]) and steps_ahead(cfg) == 1
    (taught,) = SIGNALS.get("labels")().begin(cfg.rewards).step([labels_of(work)]).feedback
    assert taught.pairs.tolist() == [[1, 0]] and taught.pair_weights.tolist() == [1]


def test_labels_order_all_pairs_but_equal_ones():
    from scored_groups import scored

    from pipeline.rl.signals.base import LABEL

    state = SIGNALS.get("labels")().begin({})
    (taught,) = state.step([scored(**{LABEL: [0.5, 1, 0.5]})]).feedback
    assert taught.pairs.tolist() == [[1, 0], [1, 2]]
    assert state.is_flat(scored(**{LABEL: [1, 1]})) and not state.is_flat(scored(**{LABEL: [1, 0]}))


def test_answers_given_again_do_not_count_twice(tmp_path):
    again = {"id": ["1", "2", None, "4"], "rater": ["ada"] * 4, "repeat_of": [None, None, None, "1"]}
    files = {"path_a": ["a0.png", "a1.png", "a2.png", "b0.png"], "path_b": ["b0.png", "b1.png", "b2.png", "a0.png"]}
    table = write_table(tmp_path, **files, **again)
    assert [row.index for row in source_of(config(table)).rows(config(table))] == [0, 1]


def test_bytes_are_kept_as_files_beside_the_table(tmp_path):
    data = pictures(8)
    sides = {"bytes_a": data[::2], "bytes_b": [{"bytes": each, "path": "x"} for each in data[1::2]]}
    table = write_table(tmp_path, path_a=None, path_b=None, **sides)
    rows = load_prompts(table)
    assert Path(rows[3].takes[1].path).read_bytes() == data[7]
    assert Path(rows[0].takes[0].path).parent == tmp_path / "pairs.parquet.images"
    assert [row.takes for row in load_prompts(table)] == [row.takes for row in rows]


def test_turned_labels_and_other_pictures_are_another_data_set(table):
    before = content_digest(load_prompts(table))
    write_table(table.parent, label=["b", "b", "tie", "b"])
    assert content_digest(load_prompts(table)) != before
    write_table(table.parent)
    assert content_digest(load_prompts(table)) == before
    (table.parent / "b3.png").write_bytes(pictures(1, seed=9)[0])
    assert content_digest(load_prompts(table)) != before


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path_a": ["a0.png", "../x.png", "a2.png", "a3.png"]}, r"row 2: take a '../x.png' leads out of"),
        ({"path_b": ["/etc/passwd", "b1.png", "b2.png", "b3.png"]}, r"row 1: take b '/etc/passwd' leads out of"),
        ({"label": ["tie"] * 4}, "all 4 pairs are ties, which teach nothing"),
        ({"label": ["a", "b", "worse", "a"]}, "row 3: label 'worse' is none of a, b, tie"),
        ({"prompt": ["x", "", "y", "z"]}, "row 2: the prompt is empty"),
        (
            {"path_a": ["g.png"] * 4, "path_b": ["h.png"] * 4},
            "2 of 2 takes that were looked at cannot be used; .*g.png",
        ),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(tmp_path, columns, message):
    table = write_table(tmp_path, **columns)
    with pytest.raises(InputError, match=f"^prompts.train: {table}.*{message}") as error:
        check_prompts(config(table))
    assert "\n" not in str(error.value)


def test_takes_of_another_size_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"6 of 6 takes .* 24x24, and the generator makes 16x16; set source.fit"):
        check_prompts(config(write_table(tmp_path, size=24)))
    check_prompts(config(write_table(tmp_path, size=24), source={"fit": "crop"}))


def test_a_few_bad_files_are_noted_and_stay(table, caplog):
    (table.parent / "a0.png").unlink()
    (table.parent / "b1.png").write_bytes(b"no picture")
    assert len(check_prompts(config(table))[0]) == 3
    assert "2 of 6 takes that were looked at cannot be used" in caplog.text and "a0.png" in caplog.text


def test_prompts_are_no_pairs(tmp_path):
    (tmp_path / "train.txt").write_text("a cat\n")
    with pytest.raises(InputError, match="train.txt: is no table of labelled pairs, which source labelled needs"):
        check_prompts(config(tmp_path / "train.txt"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"step": {"takes": 4}}, "step.takes: found 4; the groups of source labelled are pairs: set 2"),
        (
            {"objective": {"name": "grpo"}, "signal": {"name": "advantages"}},
            "objective.name: grpo trains on what the policy drew, and source labelled gives",
        ),
        (
            {"signal": {"name": "pairs"}},
            "signal.name: pairs orders takes by rewards, and takes of source labelled are judged by labels",
        ),
        (
            {"source": {"name": "rollout", "largest_error": None}},
            "labels orders takes by labels, and takes of source rollout are judged by rewards",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(table, sections, message):
    sections = {name: dict(values) for name, values in sections.items()}
    cfg = config(table, **{name: values for name, values in sections.items() if name != "source"})
    if "source" in sections:
        cfg = Config.model_validate({**cfg.model_dump(mode="json"), "source": {"name": "rollout"}})
    with pytest.raises(ConfigError, match=message):
        check_recipe(cfg)
