"""What each method gains: the recipes in `configs/methods/`, over seeds, judged on held-out prompts.

    python -m benchmarks.learning.methods [NAME …] [--seeds 0 1 2] [--overrides run.steps=15 …]
    python -m benchmarks.learning.methods --docs        # the results -> the table in docs/methods.md and its plot

Runs rollout, scoring and update in this one process and thread, with the library that the actors call: what is learned
does not depend on the number of workers. Rewards are compared on the same held-out prompts and seeds before and after;
the prompt is the unit of the standard error. Results are merged into `benchmarks/results/methods.json`; a recipe, seed
and overrides that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import marked_block
from benchmarks.learning.samples import ROOT, Loop
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.files import atomic_write
from pipeline.core.statistics import estimate_of_means, with_error

RECIPES = ROOT / "configs/methods"
RESULTS = ROOT / "benchmarks/results/methods.json"
DOCS, PICTURE = ROOT / "docs/methods.md", ROOT / "docs/images/methods.png"
BEGIN, END = "<!-- methods: begin (benchmarks.learning.methods --docs) -->", "<!-- methods: end -->"
BASELINES = ("grpo", "awm")  # every method's gain per take and per minute stands beside theirs


def names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def run(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One recipe with one seed: `rewards[reward] = {before, after}` by held-out prompt, takes, seconds."""
    cfg = load_config(RECIPES / f"{name}.yaml", [f"run.seed={seed}", *overrides])
    loop = Loop(cfg)
    before = loop.evaluate()["rewards"]
    started = time.process_time()
    for step in range(cfg.run.steps):
        loop.step(step)
    seconds = time.process_time() - started  # of the one thread: on an idle core, wall seconds
    after = loop.evaluate()["rewards"]
    return {
        "generator": Path(cfg.generator.pretrained).name,
        "overrides": overrides,
        "seed": seed,
        "takes": loop.group * cfg.step.takes,
        "wall_s": round(seconds, 1),
        "rewards": {
            reward: {"before": _by_prompt(before[reward]), "after": _by_prompt(after[reward])} for reward in before
        },
        "weights": judging_weights(cfg),
    }


def missing_data(name: str, overrides: list[str]) -> str:
    """Which data a recipe lacks, and what its head says makes them; "" where nothing is missing."""
    path = RECIPES / f"{name}.yaml"
    train = load_config(path, overrides).prompts.train
    if train.exists():
        return ""
    head = [line.lstrip("# ") for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    made = next((line.split("  ")[0] for line in head if line.startswith("python -m")), f"see the head of {path.name}")
    return f"{name}: {train} is not there; first run: {made}"


def _by_prompt(means: list[float]) -> list[float | None]:
    """None, as JSON has no NaN: the reward does not apply to the prompt."""
    return [None if np.isnan(mean) else mean for mean in means]


def judging_weights(cfg: Config) -> dict[str, float]:
    """Weight of each reward in what a method is judged by: the rewards that its takes were compared by; where it learns
    through a reward's gradient, those that it only watched."""
    if not cfg.gradient_rewards:
        return cfg.reward_weights
    return {name: float(not reward.gradient) for name, reward in cfg.rewards.items()}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one recipe's seeds. `se`: paired over prompts and seeds, the larger of the two sources of spread."""
    rewards = {}
    weighted, weights = [], []
    for name in runs[0]["rewards"]:
        before = np.array(
            [run["rewards"][name]["before"] for run in runs], float
        )  # [seeds, prompts]; NaN: does not apply
        after = np.array([run["rewards"][name]["after"] for run in runs], float)
        applies = ~np.isnan(before).any(0)
        rewards[name] = _change(before[:, applies], after[:, applies])
        weight = runs[0]["weights"][name] * applies
        weighted.append(weight * np.nan_to_num(np.stack([before, after])))
        weights.append(weight)
    counts = np.sum(weights, axis=0) > 0  # prompts that some reward with a weight applies to
    total = np.sum(weighted, axis=0)[..., counts] / np.sum(weights, axis=0)[counts]
    return {
        "generator": runs[0]["generator"],
        "takes": round(float(np.mean([run["takes"] for run in runs]))),
        "seeds": len(runs),
        "wall_s": round(float(np.mean([run["wall_s"] for run in runs])), 1),
        **_change(total[0], total[1]),
        "rewards": rewards,
    }


def _change(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """`before`, `after`: [seeds, prompts]."""
    rises = after - before
    over_prompts = estimate_of_means(rises.mean(0)).se or 0.0
    over_seeds = float(rises.mean(1).std(ddof=1) / np.sqrt(len(rises))) if len(rises) > 1 else 0.0
    return {
        "before": round(float(before.mean()), 4),
        "after": round(float(after.mean()), 4),
        "se": round(max(over_prompts, over_seeds), 4),
    }


# ------------------------------------------------------------------------------------------- the file and the page


def read() -> dict[str, Any]:
    """Name -> summary, and its runs under `runs`."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(name: str, result: dict[str, Any]) -> None:
    results = read()
    runs = [*results.get(name, {}).get("runs", []), result]
    same = [each for each in runs if each["overrides"] == result["overrides"]]
    results[name] = {**summarise(same), "command": command(name, same), "runs": runs}
    atomic_write(RESULTS, (json.dumps(dict(sorted(results.items())), indent=1) + "\n").encode())


def command(name: str, runs: list[dict[str, Any]]) -> str:
    seeds = " ".join(str(run["seed"]) for run in runs)
    overrides = f" --overrides {' '.join(runs[0]['overrides'])}" if runs[0]["overrides"] else ""
    return f"python -m benchmarks.learning.methods {name} --seeds {seeds}{overrides}"


def table(results: dict[str, Any]) -> str:
    """Markdown, best first within a generator."""
    lines = [
        "| method | generator | takes | before | after | rise (± standard error) | per 1,000 takes | per minute "
        "| seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = sorted(results.items(), key=lambda item: (item[1]["generator"], item[1]["before"] - item[1]["after"]))
    for name, row in rows:
        rise = row["after"] - row["before"]
        each = ", ".join(
            f"{reward} {with_error(value['after'] - value['before'], value['se'], 3, '+')}"
            for reward, value in row["rewards"].items()
        )
        detail = f" ({each})" if len(row["rewards"]) > 1 else ""
        lines.append(
            f"| [{name}](../configs/methods/{name}.yaml) | {row['generator']} | {row['takes']:,} | {row['before']:.3f} "
            f"| {row['after']:.3f} | {with_error(rise, row['se'], 3, '+')}{detail} | {1000 * rise / row['takes']:+.3f} "
            f"| {60 * rise / row['wall_s']:+.3f} | {row['seeds']} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(results.items(), key=lambda item: item[1]["after"] - item[1]["before"])
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.32 * len(rows)), layout="constrained")
    rises = [row["after"] - row["before"] for _, row in rows]
    colours = ["tab:orange" if name in BASELINES else "tab:blue" for name, _ in rows]
    labels = [f"{name} ({row['generator'].removeprefix('shapes-')}, {row['takes']:,} takes)" for name, row in rows]
    axis.barh(labels, rises, xerr=[row["se"] for _, row in rows], color=colours, capsize=2)
    axis.axvline(0, color="grey", linewidth=0.5)
    axis.set(xlabel="rise in held-out reward (± standard error)")
    figure.savefig(path, dpi=110)


def write_docs() -> None:
    results = read()
    plot(results, PICTURE)
    marked_block.renew(DOCS, BEGIN, END, table(results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(names())}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--docs", action="store_true", help="run nothing: write the table and the plot")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return 0
    if unknown := set(options.names) - set(names()):
        parser.error(f"no such recipe: {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    for name in options.names or names():
        if lacking := missing_data(name, options.overrides):
            parser.error(lacking)
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.names or names():
            done = read().get(name, {}).get("runs", [])
            if any(each["seed"] == seed and each["overrides"] == options.overrides for each in done):
                continue
            result = run(name, seed, options.overrides)
            keep(name, result)
            row = summarise([result])
            text = (
                f"{name} seed {seed}: {row['before']:.4f} -> {row['after']:.4f} (paired standard error {row['se']:.4f}"
            )
            print(f"{text}, {row['takes']} takes, {row['wall_s']:.0f} s)", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
