"""Seeds and windows: deterministic, distinct, never the last step."""

from __future__ import annotations

from pipeline.config.schema import Config
from pipeline.core.types import PromptItem
from pipeline.rl.group_plan import accumulation_chunks, eval_works, stochastic_steps, train_work

PROMPT = PromptItem(index=3, text="a red circle")


def config(**sampler) -> Config:
    return Config.model_validate(
        {
            "generator": {"pretrained": "x"},
            "prompts": {"train": "x"},
            "rewards": {"r": {"scorer": "s"}},
            "sampler": {"steps": 10, **sampler},
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


def test_all_steps_but_the_last_draw_noise():
    assert stochastic_steps(config().sampler, 0, 5) == tuple(range(9))


def test_random_window_covers_its_range_and_nothing_else():
    cfg = config(window={"kind": "random", "size": 2, "range": [1, 5]}).sampler
    seen = {stochastic_steps(cfg, 0, step) for step in range(200)}
    assert seen == {(1, 2), (2, 3), (3, 4)}


def test_sliding_window_moves_and_starts_over():
    cfg = config(window={"kind": "sliding", "size": 4, "every": 3, "range": [0, 6]}).sampler
    firsts = [stochastic_steps(cfg, 0, step)[0] for step in range(12)]
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
