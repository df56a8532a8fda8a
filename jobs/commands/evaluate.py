"""`rushes evaluate`: checkpoints compared on the same prompts and seeds, in this process, without Ray.

The first row is the generator before training; the others are compared with it take by take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import ConfigPath, Debug, Ema, Overrides, make_console, say
from pipeline.core.errors import ConfigError


@command(Group.RUN)
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", "-c", help="A run, a checkpoint or an export; may be repeated."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Prompts file; default: prompts.heldout.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for results.json and the takes.")] = None,
    search: Annotated[
        list[str] | None,
        typer.Option("--search", help="Compare searches: a name or a YAML file; may be repeated."),
    ] = None,
    passes: Annotated[
        list[int] | None,
        typer.Option("--passes", help="Budget of the searches, in plain takes; may be repeated. Default: their own."),
    ] = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Also evaluate the generator before training.")] = True,
    ema: Ema = True,
    debug: Debug = False,
) -> None:
    """Compare checkpoints on the same prompts and seeds.

    Prints mean rewards with their standard error, paired differences, win rates and the verdict on each checkpoint
    against the first row. Prompts are the independent units. With --search, prints and plots score against denoiser
    calls of each search instead.

    \b
    Examples:
      rushes evaluate configs/quickstart.yaml --checkpoint runs/try
      rushes evaluate configs/quickstart.yaml -c runs/a -c runs/b/export evaluation.takes_per_prompt=4
      rushes evaluate configs/quickstart.yaml -c runs/try/checkpoints/step-000050 --prompts mine.txt --out eval
      rushes evaluate configs/quickstart-image.yaml --search best-of-n --search fk --passes 2 --passes 8 --out curves
    """
    import json

    import numpy as np

    from jobs.common.evaluation_table import labels_of, print_table, sample_and_score, summarise
    from jobs.common.load_trained import Trained, find_trained, load_policy
    from jobs.common.search_curves import (
        Point,
        labels_of_searches,
        plot_points,
        print_points,
        run_points,
        summarise_points,
    )
    from jobs.common.searching import read_search_option, rewards_of, takes_wanted
    from pipeline.config.load import load_config
    from pipeline.core.files import atomic_write
    from pipeline.core.prompts import check_prompt_lengths, load_prompts, prompt_locations
    from pipeline.rewards.routing import check_routing
    from pipeline.rl.group_plan import eval_works
    from pipeline.runs.verdict import tolerances
    from pipeline.tools import preflight

    cfg, console = load_config(config, overrides or []), make_console()
    path = prompts or cfg.prompts.heldout
    if path is None:
        raise ConfigError("evaluate: the config has no prompts.heldout; set it or give --prompts FILE")
    if passes and not search:
        raise ConfigError("evaluate: --passes belongs to a search; add --search NAME")
    budgets: list[int | None] = [*passes] if passes else [None]  # None: the search's own
    chosen = {text: [read_search_option(cfg, text, budget) for budget in budgets] for text in search or []}
    if not checkpoint and not base:
        raise ConfigError("evaluate: nothing to evaluate; give --checkpoint or leave --no-base out")
    items = load_prompts(path)
    preflight.check_devices(cfg)
    preflight.check_rewards(cfg)
    preflight.check_guards(cfg)
    preflight.check_generator(cfg, [], [])
    check_routing(items, list(cfg.rewards), prompt_locations(path), path)
    check_prompt_lengths(items, cfg.generator.pretrained, cfg.generator.call_kwargs, path)
    if out is not None:
        preflight.check_writable(out, "--out")
    sources: list[Trained | None] = ([None] if base else []) + [find_trained(c) for c in checkpoint or []]

    runners = rewards_of(cfg)
    if chosen:
        labels = labels_of_searches([some[0] for some in chosen.values()], list(chosen))
        searches = dict(zip(labels, chosen.values(), strict=True))
        points: list[Point] = []
        for label, source in zip(labels_of(sources), sources, strict=True):
            points += run_points(cfg, load_policy(cfg, source, ema), label, searches, runners, items, console)
        shown = items[: cfg.evaluation.prompts or len(items)]
        units = np.array([w.prompt.index for w in takes_wanted(cfg, shown, cfg.evaluation.takes_per_prompt, 0)])
        rows = summarise_points(points, cfg.reward_weights, units)
        print_points(rows, list(runners), console, len(np.unique(units)), len(units))
        if out is not None:
            atomic_write(out / "search.png", plot_points(rows, list(runners), f"{config.name}: searches"))
            atomic_write(out / "results.json", json.dumps(rows, indent=1).encode())
            say(console, f"written to {out / 'results.json'} and {out / 'search.png'}")
        return
    works = eval_works(cfg, items, step=0)
    prompt_of_take = np.array([prompt.index for work in works for prompt in work.prompts])
    results, measured = {}, {}
    for number, (label, source) in enumerate(zip(labels_of(sources), sources, strict=True)):
        folder = out / f"{number:02d}-takes" if out is not None else None
        scored = sample_and_score(cfg, source, label, works, runners, ema, folder, console)
        results[label], measured[label] = scored
    rows = summarise(results, cfg.reward_weights, prompt_of_take, measured, tolerances(cfg))
    print_table(rows, list(runners), console, len(np.unique(prompt_of_take)), len(prompt_of_take))
    if out is not None:
        atomic_write(out / "results.json", json.dumps(rows, indent=1).encode())
        say(console, f"written to {out / 'results.json'}")
