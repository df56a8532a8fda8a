"""What a group of takes will be, decided before anything runs: seeds, initial noise, window of stochastic steps.

Everything is a pure function of (run seed, group id, step) and of the pipeline's noise levels, which its checkpoint and
the config fix, so that a retry, another worker or a resumed run draws the same takes. Also how a step's groups are
joined into rollout calls and chunks of gradient accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.config.schema import Config, SamplerConfig
from pipeline.core.errors import ConfigError
from pipeline.core.types import Begin, GroupWork, PromptItem, SamplingSpec
from pipeline.rl.noise_grid import LEAST_SIGMA_NEXT, NoiseGrid, no_noisy_step
from pipeline.rl.objectives import objective_of
from pipeline.rl.signals import signal_of
from pipeline.rl.sources import source_of

SHOWN_PROMPTS = 6  # held-out prompts whose takes are kept at every evaluation; at the first and the last, all are
_MAX_CHUNKS = 8  # per step: each is a call of the learner, and the last one's overhead is not overlapped
_TAKES, _NOISE, _WINDOW, _SUBSET, _SCORING, _TAIL = 1, 2, 3, 4, 5, 6  # separate random streams of one group

EVALUATION_SEED = 1234  # the same takes at every evaluation, of every run


def _rng(seed: int, stream: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, stream, *key]))


def default_end(cfg: Config, grid: NoiseGrid | None) -> int:
    """End of the sampler steps that the window covers where the config names none.

    Steps that draw noise must leave enough of the chain to remove it (`NoiseGrid.noisy_steps`). Without noise, or
    before the grid is known (`grid` None), all steps but the last.
    """
    last = cfg.sampler.steps - 1
    if grid is None or not objective_of(cfg).requirements.draws_noise:
        return last
    return min(grid.noisy_steps, last)


def check_window(cfg: Config, grid: NoiseGrid | None) -> None:
    """Raises `ConfigError` where the window does not fit into the steps that may draw noise by default."""
    window, end = cfg.sampler.window, default_end(cfg, grid)
    if window.range is not None or grid is None or objective_of(cfg).requirements.unit == "tail":
        return
    if end == 0:
        raise no_noisy_step(grid)
    if window.kind != "all" and window.size > end:
        raise ConfigError(
            f"sampler.window.size: found {window.size}; only the first {end} of {cfg.sampler.steps} steps "
            f"({grid.describe()}) may draw noise, as later ones end below {LEAST_SIGMA_NEXT}; use {end} or less, or "
            "name the steps: sampler.window.range=[first,end]"
        )


def check_begin(cfg: Config, grid: NoiseGrid, key: str, noise: float) -> None:
    """Raises `ConfigError` where takes that begin at the noise level `noise`, set by `key`, have no step to train."""
    first, count = grid.step_at(noise), len(grid.levels)
    if not 0 < first < count:
        what = "none of it is left" if first == 0 else "no step is left to take"
        raise ConfigError(
            f"{key}: found {noise:g}, which is the {'first' if first == 0 else 'end'} of {count} levels "
            f"({grid.describe()}): {what}; set it {'lower' if first == 0 else 'higher'}, or raise sampler.steps"
        )
    objective = objective_of(cfg)
    if objective.requirements.unit == "tail":
        earliest = min(min(trained_steps(cfg, 0, step)) for step in range(64))
        if earliest < first:
            raise ConfigError(
                f"{key}: found {noise:g}, where takes begin at step {first} of {count}; objective {objective.name} "
                f"trains steps from {earliest} on: raise {key}, or train a shorter tail"
            )
        return
    window, end = cfg.sampler.window, default_end(cfg, grid)
    start, stop = window.bounds(end)
    if stop <= first or (window.kind != "all" and start < first):
        raise ConfigError(
            f"sampler.window.range: trains steps [{start}, {stop}), and takes begin at step {first} of {count} "
            f"({key}: {noise:g}); set sampler.window.range=[{first},{max(end, first + 1)}], or raise {key}"
        )


def stochastic_steps(cfg: SamplerConfig, run_seed: int, step: int, end: int) -> tuple[int, ...]:
    """Sampler steps that draw noise in optimisation step `step`. `end`: `default_end`, where the config has no range.

    all: every one (Flow-GRPO). random: a window drawn anew each step (Flow-GRPO-Fast).
    sliding: from the range's first step, moves by one every `every` steps, and starts over at the end (MixGRPO).
    growing: from the range's last `size` steps, grows by one every `every` steps, back to the first one (B2-DiffuRL).
    """
    window = cfg.window
    start, stop = window.bounds(end)
    if window.kind == "all":
        return tuple(range(start, stop))
    if window.kind == "growing":
        return tuple(range(max(start, stop - window.size - step // window.every), stop))
    positions = stop - start - window.size + 1
    if window.kind == "random":
        first = start + int(_rng(run_seed, _WINDOW, step).integers(positions))
    else:
        first = start + (step // window.every) % positions
    return tuple(range(first, first + window.size))


def trained_subset(cfg: SamplerConfig, steps: Sequence[int], run_seed: int, group: int) -> tuple[int, ...]:
    """The share `timestep_fraction` of the stochastic steps that is trained, drawn per group (DanceGRPO)."""
    keep = max(1, round(cfg.timestep_fraction * len(steps)))
    if keep == len(steps):
        return tuple(steps)
    chosen = _rng(run_seed, _SUBSET, group).permutation(len(steps))[:keep]
    return tuple(steps[i] for i in sorted(chosen))


def trained_steps(cfg: Config, group: int, step: int, grid: NoiseGrid | None = None, first: int = 0) -> tuple[int, ...]:
    """The sampler steps that a group trains in optimisation step `step`, the same for all its takes. `first`: the one
    that the takes begin at."""
    objective, seed = objective_of(cfg), cfg.run.seed
    if objective.requirements.unit == "tail":
        return tuple(objective.tail_steps(cfg.sampler.steps, _rng(seed, _TAIL, step), _rng(seed, _TAIL, step, group)))
    window = stochastic_steps(cfg.sampler, seed, step, default_end(cfg, grid))
    return trained_subset(cfg.sampler, [index for index in window if index >= first], seed, group)


def most_trained_steps(cfg: Config) -> int:
    """Of any group: what memory is planned for."""
    return max(len(trained_steps(cfg, 0, step)) for step in (*range(64), cfg.run.steps - 1))


def train_work(
    cfg: Config,
    group: int,
    step: int,
    prompt: PromptItem,
    attempt: int = 1,
    *,
    grid: NoiseGrid | None = None,
    begin: Begin | None = None,
    drawn: bool = True,
) -> GroupWork:
    """One prompt, K takes, to be consumed by optimisation step `step`. `grid`: of the probed pipeline. `begin`: where
    the takes begin; no step before it draws noise or trains. `drawn`: see `GroupWork`."""
    seed = cfg.run.seed
    takes = cfg.step.takes
    seeds = _rng(seed, _TAKES, group).integers(2**62, size=takes)
    initial = initial_noise(cfg, group)
    first = begin.step if begin is not None else 0
    noisy: tuple[int, ...] = ()  # without noise, the window still says which noise levels train
    if objective_of(cfg).requirements.draws_noise:
        window = stochastic_steps(cfg.sampler, seed, step, default_end(cfg, grid))
        noisy = tuple(index for index in window if index >= first)
    return GroupWork(
        group=group,
        attempt=attempt,
        purpose="train",
        step=step,
        prompts=(prompt,) * takes,
        seeds=tuple(int(s) for s in seeds),
        initial=initial,
        sampling=SamplingSpec(
            kind=cfg.sampler.kind if noisy else "ode",
            noise_level=cfg.sampler.noise_level if noisy else 0.0,
            num_steps=cfg.sampler.steps,
            stochastic_steps=noisy,
            trained_steps=trained_steps(cfg, group, step, grid, first),
            guidance_scale=cfg.generator.guidance_scale,
        ),
        begin=begin,
        drawn=drawn,
        scoring_seed=scoring_seed(cfg, group),
    )


def initial_noise(cfg: Config, group: int) -> tuple[int, ...]:
    """[K], the seeds of the takes' initial noise where some share it; (): each has its own."""
    shared, takes = cfg.sampler.same_initial_noise, cfg.step.takes
    if not shared:
        return ()
    alike = takes if shared is True else shared
    source = _rng(cfg.run.seed, _NOISE, group)
    return tuple(seed for _ in range(takes // alike) for seed in [int(source.integers(2**62))] * alike)


def scoring_seed(cfg: Config, group: int) -> int:
    """Seed from which the reward servers pick the frames of a training group."""
    return int(np.random.SeedSequence([cfg.run.seed, _SCORING, group]).generate_state(1)[0])


def takes_of_call(cfg: Config) -> int:
    """Takes that a worker draws in one pipeline call: part of a group, a whole one, or several groups of a step."""
    takes = cfg.step.takes
    batch = cfg.rollout.batch or takes
    return batch if batch < takes else takes * min(batch // takes, cfg.step.groups)


def rollout_call_index(cfg: Config, position: int) -> int | None:
    """Index within a step of the rollout call that the group shares with others; None: it is drawn alone.

    `position`: of the group among those admitted to the step, from 0. It fixes the call, so results do not depend on
    timing. Groups that replace a filtered or failed one are drawn alone.
    """
    groups = takes_of_call(cfg) // cfg.step.takes
    return position // groups if groups > 1 and position < cfg.step.groups else None


def steps_ahead(cfg: Config) -> int:
    """How many steps before the one that consumes them groups may be made: as many versions as their takes may be
    stale; those of data do not age, and are encoded while the learner trains the step before."""
    return cfg.step.max_staleness if source_of(cfg).draws else max(1, cfg.step.max_staleness)


def accumulation_chunks(cfg: Config) -> list[range]:
    """Positions in a step's batch whose gradients are accumulated in one call of the learner, once they are scored.

    A chunk has one group for each data-parallel rank or replica (more, where that would make over `_MAX_CHUNKS`). The
    whole step is one chunk where an advantage depends on other groups too, or a step makes several optimiser updates.
    The order of summation is the same in every run, whichever groups were scored first.
    """
    groups = cfg.step.groups
    if signal_of(cfg).needs_whole_step(cfg.rewards) or cfg.step.updates > 1:
        return [range(groups)]
    groups_at_once = cfg.learner.ranks // cfg.learner.context_parallel * cfg.learner.replicas
    size = groups_at_once * math.ceil(groups / groups_at_once / _MAX_CHUNKS)
    return [range(start, min(start + size, groups)) for start in range(0, groups, size)]


def ode_sampling(cfg: Config, num_steps: int) -> SamplingSpec:
    """Deterministic sampling, as used for evaluation, generation and export checks."""
    return SamplingSpec(
        kind="ode",
        noise_level=0.0,
        num_steps=num_steps,
        stochastic_steps=(),
        trained_steps=(),
        guidance_scale=cfg.generator.guidance_scale,
    )


def eval_works(cfg: Config, prompts: Sequence[PromptItem], step: int, seed: int = EVALUATION_SEED) -> list[GroupWork]:
    """The evaluation: the first `evaluation.prompts` prompts x `takes_per_prompt` takes from `seed`, in ODE batches."""
    chosen = prompts[: cfg.evaluation.prompts or len(prompts)]
    takes = [
        (prompt, int(_rng(seed, _TAKES, prompt.index, take).integers(2**62)))
        for prompt in chosen
        for take in range(cfg.evaluation.takes_per_prompt)
    ]
    size = cfg.evaluation.batch
    return [
        GroupWork(
            group=start // size,
            attempt=1,
            purpose="eval",
            step=step,
            prompts=tuple(prompt for prompt, _ in takes[start : start + size]),
            seeds=tuple(seed for _, seed in takes[start : start + size]),
            sampling=ode_sampling(cfg, cfg.evaluation.steps),
        )
        for start in range(0, len(takes), size)
    ]


def sample_works(
    cfg: Config, prompts: Sequence[PromptItem], takes: int, seed: int, steps: int | None = None
) -> list[GroupWork]:
    """What `rushes generate` draws: all prompts x `takes` from `seed`, in ODE batches. `steps`: of the sampler; None:
    `evaluation.steps`."""
    update = {"prompts": 0, "takes_per_prompt": takes, "steps": steps or cfg.evaluation.steps}
    evaluation = cfg.evaluation.model_copy(update=update)
    return eval_works(cfg.model_copy(update={"evaluation": evaluation}), prompts, step=0, seed=seed)
