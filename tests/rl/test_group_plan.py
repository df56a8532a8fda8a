"""Seeds and windows: deterministic, distinct, never a step whose noise stays in the picture."""

from __future__ import annotations

import pytest
from noise_grids import GRIDS

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.core.types import PromptItem
from pipeline.rl.group_plan import (
    accumulation_chunks,
    check_window,
    eval_works,
    most_trained_steps,
    stochastic_steps,
    train_work,
    trained_steps,
)

PROMPT = PromptItem(index=3, text="a red circle")


def config(objective: str = "grpo", **sampler) -> Config:
    return Config.model_validate(
        {
            "generator": {"pretrained": "x"},
            "prompts": {"train": "x"},
            "rewards": {"r": {"scorer": "s"}},
            "sampler": {"steps": 10, **sampler},
            "objective": {"name": objective},
        }
    )


def test_a_retry_draws_the_same_takes():
    cfg = config(same_initial_noise=True)
    first, again = train_work(cfg, 7, 2, PROMPT, 1), train_work(cfg, 7, 2, PROMPT, 3)
    assert first.seeds == again.seeds and first.noise_seeds == again.noise_seeds != first.seeds
    assert first.sampling == again.sampling and again.attempt == 3
    other = train_work(cfg, 8, 2, PROMPT)
    assert not set(first.seeds) & set(other.seeds)
    assert len(set(first.seeds)) == cfg.step.takes


def test_branches_share_their_initial_noise_and_no_other_seed():
    cfg = config(same_initial_noise=4)
    work = train_work(cfg, 7, 2, PROMPT)
    branches = [work.noise_seeds[start : start + 4] for start in range(0, cfg.step.takes, 4)]
    assert all(len(set(branch)) == 1 for branch in branches)
    assert len({branch[0] for branch in branches}) == cfg.step.takes // 4 > 1
    assert len(set(work.seeds)) == cfg.step.takes
    with pytest.raises(ValueError, match="is no multiple of that"):
        config(same_initial_noise=3)


def test_a_growing_window_goes_back_from_the_last_steps_to_the_first():
    cfg = config(window={"kind": "growing", "size": 2, "every": 10, "range": [1, 5]})
    steps = {step: train_work(cfg, 0, step, PROMPT).sampling.stochastic_steps for step in (0, 9, 10, 20, 1000)}
    assert steps == {0: (3, 4), 9: (3, 4), 10: (2, 3, 4), 20: (1, 2, 3, 4), 1000: (1, 2, 3, 4)}
    assert most_trained_steps(cfg) == 4


def sampled(cfg: Config, grid: str):
    return train_work(cfg, 0, 5, PROMPT, grid=GRIDS[grid]).sampling


def test_steps_whose_noise_stays_draw_none_by_default():
    """The 10-step grid of SD3 ends 0.278, 0.009, 0: neither of its last two steps draws noise."""
    sampling = sampled(config(), "sd3")
    assert sampling.stochastic_steps == sampling.trained_steps == tuple(range(8))
    assert sampled(config(), "linspace").stochastic_steps == tuple(range(9))  # ends 0.2, 0.1, 0


def test_a_range_that_is_named_counts():
    sampling = sampled(config(window={"range": [2, 9]}), "sd3")
    assert sampling.stochastic_steps == sampling.trained_steps == tuple(range(2, 9))


def test_without_noise_all_levels_but_the_last_train():
    sampling = sampled(config(objective="awm"), "sd3")
    assert sampling.stochastic_steps == () and sampling.trained_steps == tuple(range(9))


def test_a_window_moves_within_the_steps_that_draw_noise():
    cfg = config(window={"kind": "random", "size": 3})
    works = [train_work(cfg, 0, step, PROMPT, grid=GRIDS["sd3"]) for step in range(200)]
    assert {work.sampling.stochastic_steps[-1] for work in works} == set(range(2, 8))


@pytest.mark.parametrize(
    ("cfg", "grid", "words"),
    [
        (config(window={"kind": "sliding", "size": 9}), "sd3", ["sampler.window.size: found 9", "use 8 or less"]),
        (config(steps=2), "sd3 in 2 steps", ["sampler.steps: of 2 steps", "sampler.window.range=[0,1]"]),
    ],
)
def test_a_window_that_does_not_fit_the_noise_levels_is_refused(cfg, grid, words):
    with pytest.raises(ConfigError) as error:
        check_window(cfg, GRIDS[grid])
    assert all(word in str(error.value) for word in words)
    check_window(config(window={"range": [0, 9]}), GRIDS["sd3"])  # what was named counts
    check_window(cfg, GRIDS["linspace"])


def test_random_window_covers_its_range_and_nothing_else():
    cfg = config(window={"kind": "random", "size": 2, "range": [1, 5]}).sampler
    seen = {stochastic_steps(cfg, 0, step, 9) for step in range(200)}
    assert seen == {(1, 2), (2, 3), (3, 4)}


def test_sliding_window_moves_and_starts_over():
    cfg = config(window={"kind": "sliding", "size": 4, "every": 3, "range": [0, 6]}).sampler
    firsts = [stochastic_steps(cfg, 0, step, 9)[0] for step in range(12)]
    assert firsts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]


def test_timestep_fraction_trains_a_subset_drawn_per_group():
    cfg = config(timestep_fraction=0.6)
    subsets = {train_work(cfg, group, 0, PROMPT).sampling.trained_steps for group in range(50)}
    assert len(subsets) > 10
    for subset in subsets:
        assert len(subset) == 5 and set(subset) <= set(range(9)) and list(subset) == sorted(subset)


def test_evaluation_is_fixed_and_deterministic_sampling():
    cfg = config()
    prompts = [PromptItem(index=i, text=str(i)) for i in range(40)]
    a, b = eval_works(cfg, prompts, 0), eval_works(cfg, prompts, 9)
    assert [w.seeds for w in a] == [w.seeds for w in b]
    assert sum(w.takes for w in a) == 40 and all(w.sampling.trained_steps == () for w in a)
    assert all(w.sampling.kind == "ode" for w in a)


def test_the_learner_begins_early_only_where_an_advantage_is_its_group_s_own():
    def cut(ranks=1, groups=6, normalize="none", updates=1, std="group") -> list[range]:
        cfg = config().model_dump()
        cfg["step"] |= {"groups": groups, "updates": updates}
        cfg["signal"]["std"] = std
        cfg["learner"]["ranks"] = ranks
        cfg["rewards"]["r"]["normalize"] = normalize
        return accumulation_chunks(Config.model_validate(cfg))

    whole = [range(6)]
    assert cut() == [range(i, i + 1) for i in range(6)]
    assert cut(ranks=4) == [range(0, 4), range(4, 6)]
    assert [len(part) for part in cut(groups=20)] == [3] * 6 + [2]
    assert cut(std="global") == cut(updates=2) == cut(normalize="step") == whole


def tail_config(**options) -> Config:
    base = config("reward_gradient").model_dump(mode="json")
    return Config.model_validate({**base, "signal": {"name": "none"}, "objective": {**base["objective"], **options}})


def test_a_tail_is_the_end_of_the_chain_and_ends_at_the_last_step():
    sampling = train_work(tail_config(tail=3), 4, 2, PROMPT, grid=GRIDS["sd3"]).sampling
    assert sampling.trained_steps == (7, 8, 9) and sampling.stochastic_steps == () and sampling.kind == "ode"


def test_a_tail_of_drawn_length_is_the_same_for_all_groups_of_a_step():
    cfg = tail_config(tail=[1, 4])
    tails = [[trained_steps(cfg, group, step) for group in (3, 8)] for step in range(64)]
    assert all(first == second and first[-1] == 9 for first, second in tails)
    lengths = [len(first) for first, _ in tails]
    assert {1, 2, 3, 4} == set(lengths) and max(lengths.count(n) for n in range(1, 5)) < 30
    assert tails == [[trained_steps(cfg, group, step) for group in (3, 8)] for step in range(64)]
    assert most_trained_steps(cfg) == 4


def test_a_jump_is_from_one_of_the_late_steps_drawn_for_each_group():
    cfg = tail_config(jump=3)
    steps = [trained_steps(cfg, group, 5) for group in range(60)]
    assert set(steps) == {(7,), (8,), (9,)} and min(map(steps.count, set(steps))) > 8
    assert trained_steps(tail_config(jump=3, tail=2), 0, 5) == (steps[0][0] - 1, steps[0][0])
