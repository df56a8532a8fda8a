"""Source clips: where takes begin on the grid, which steps are left to train, and what is refused before a model is
loaded."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from noise_grids import GRIDS, ddim

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.media import encode_mp4
from pipeline.rl.recipe import check_recipe
from pipeline.rl.sources import source_of
from pipeline.tools.preflight import check_prompts


def config(folder, source=None, **sections) -> Config:
    sections = {"prompts": {"train": folder}, "source": {"name": "clips", **(source or {})}, **sections}
    return tiny.config(folder / "wan", **sections)


@pytest.fixture
def folder(tmp_path):
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    for name in "abc":
        (tmp_path / f"{name}.mp4").write_bytes(encode_mp4(frames, 8.0))
        (tmp_path / f"{name}.txt").write_text(f"{name} red circle")
    return tmp_path


@pytest.mark.parametrize(
    ("grid", "noise", "step"),
    [
        (ddim(20), 0.6, 8),  # InstructVideo: 12 of 20 steps, from timestep 551 on
        (ddim(50), 0.6, 20),
        (ddim(20), 0.98, 0),
        (GRIDS["linspace"], 0.62, 4),  # 1, 0.9, 0.8, 0.7, 0.6
        (GRIDS["linspace"], 0.66, 3),
        (GRIDS["wan"], 0.6, 15),  # 0.577, after 0.645
        (GRIDS["wan"], 0.98, 2),
    ],
)
def test_takes_begin_where_the_paper_says_or_at_the_nearest_sigma(grid, noise, step):
    assert grid.step_at(noise) == step
    if grid.prediction == "flow":
        others = [abs(levels.sigma - noise) for levels in grid.levels]
        assert others[step] == min(others)


def test_the_papers_timestep():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(20)
    grid = ddim(20)
    assert scheduler.timesteps[grid.step_at(0.6)] == 551
    assert grid.levels[grid.step_at(0.6)].sigma == pytest.approx(float(scheduler.alphas_cumprod[551]))


def test_a_groups_takes_begin_at_one_clip_and_train_only_what_comes_after(folder):
    cfg = config(folder, {"noise": 0.5, "offset_noise": 0.2}, sampler={"steps": 20, "timestep_fraction": 0.3})
    source, grid = source_of(cfg), GRIDS["wan"]
    rows = source.rows(cfg)
    assert [row.text for row in rows] == ["a red circle", "b red circle", "c red circle"]
    work = source.work(cfg, 7, 2, rows[1], grid)
    first = grid.step_at(0.5)
    assert work.begin is not None and (work.begin.step, work.begin.states, work.begin.offset_noise) == (
        first,
        None,
        0.2,
    )
    assert {prompt.clip for prompt in work.prompts} == {str(folder / "b.mp4")} and len(set(work.seeds)) == 4
    assert min(work.sampling.stochastic_steps) == first and work.sampling.trained_steps
    assert set(work.sampling.trained_steps) <= set(work.sampling.stochastic_steps)
    assert work == source.work(cfg, 7, 2, rows[1], grid) != source.work(cfg, 8, 2, rows[1], grid)
    with pytest.raises(ValueError, match="probed first"):
        source.work(cfg, 7, 2, rows[1])


@pytest.mark.parametrize(
    ("grid", "source", "sampler", "message"),
    [
        (ddim(20), {"noise": 0.98}, {}, "source.noise: found 0.98, which is the first of 20 levels .* set it lower"),
        (ddim(20), {"noise": 0.02}, {}, "source.noise: found 0.02, which is the end of 20 levels .* set it higher"),
        (
            GRIDS["wan"],
            {"noise": 0.3},
            {"window": {"range": [0, 5]}},
            r"trains steps \[0, 5\), and takes begin at step",
        ),
        (GRIDS["wan"], {}, {"window": {"kind": "random"}}, r"sampler.window.range=\[15,18\], or raise source.noise"),
    ],
)
def test_a_beginning_that_leaves_nothing_to_train_is_refused(folder, grid, source, sampler, message):
    cfg = config(folder, source, sampler={"steps": 20, **sampler})
    with pytest.raises(ConfigError, match=message):
        source_of(cfg).check_grid(cfg, grid)


def test_clips_are_checked_before_a_model_is_loaded(folder):
    cfg = config(folder)
    assert len(check_prompts(cfg)[0]) == 3
    (folder / "b.mp4").write_bytes(encode_mp4(np.zeros((3, 32, 32, 3), np.uint8), 8.0))
    with pytest.raises(InputError, match=r"^prompts.train: .*b.mp4: has 3 frames, and the generator makes 5"):
        check_prompts(cfg)
    table = folder / "clips.jsonl"
    table.write_text('{"prompt": "a red circle", "clip": "a.mp4"}\n{"prompt": "b blue square"}\n')
    with pytest.raises(InputError, match=r"clips.jsonl, line 2: names no clip, which source clips needs"):
        check_prompts(config(folder, prompts={"train": table}))


def test_a_tail_that_reaches_beyond_the_beginning_is_refused(folder):
    for objective, message in (
        ({"tail": 5}, None),
        ({"tail": 6}, "trains steps from 14 on"),
        ({"jump": 7}, "from 13 on"),
    ):
        reward = {"r": {"scorer": "clip_score", "gradient": True}}
        parts = {"objective": {"name": "reward_gradient", **objective}, "signal": {"name": "none"}, "rewards": reward}
        cfg = config(folder, sampler={"steps": 20}, **parts)
        if message is None:
            source_of(cfg).check_grid(cfg, GRIDS["wan"])
            work = source_of(cfg).work(cfg, 0, 0, source_of(cfg).rows(cfg)[0], GRIDS["wan"])
            assert work.sampling.trained_steps == (15, 16, 17, 18, 19) and work.sampling.stochastic_steps == ()
            continue
        with pytest.raises(
            ConfigError, match=f"source.noise: found 0.6, where takes begin at step 15 of 20; .*{message}"
        ):
            source_of(cfg).check_grid(cfg, GRIDS["wan"])


def test_with_noise_0_the_clips_are_the_takes_and_each_may_be_another(folder):
    awm = {"objective": {"name": "awm"}, "step": {"takes": 3}}
    cfg = config(folder, {"noise": 0.0, "distinct": True}, signal={"name": "none"}, **awm)
    source = source_of(cfg)
    source.check(cfg)
    rows = source.rows(cfg)
    works = [source.work(cfg, group, 0, rows[1]) for group in range(8)]
    for work in works:
        assert not work.drawn and work.begin is None and work.sampling.trained_steps == (0, 1, 2)
        assert work.prompts[0] == rows[1] and {prompt.index for prompt in work.prompts} == {0, 1, 2}
    assert {work.prompts[1].index for work in works} == {0, 2}  # drawn for each group
    assert works[3] == source.work(cfg, 3, 0, rows[1])
    same = config(folder, {"noise": 0.0}, **awm)
    assert {prompt.index for prompt in source_of(same).work(same, 0, 0, rows[2]).prompts} == {2}
    with pytest.raises(ConfigError, match="step.takes: found 4, and .* has 3 clips; .* set step.takes lower"):
        source.rows(config(folder, {"noise": 0.0, "distinct": True}, step={"takes": 4}))
    compared = config(folder, {"noise": 0.0, "distinct": True}, signal={"name": "advantages"}, **awm)
    with pytest.raises(ConfigError, match="source.distinct: signal advantages compares the takes of a prompt"):
        source.check(compared)


def test_an_objective_on_what_the_policy_drew_refuses_takes_of_data(folder):
    cfg = config(folder, {"noise": 0.0}, objective={"name": "grpo"})
    with pytest.raises(ConfigError, match="objective.name: grpo trains on what the policy drew, and source clips"):
        check_recipe(cfg)
    check_recipe(config(folder, {"noise": 0.0}, objective={"name": "awm"}))
