"""InstructVideo's ablation: what segments (SegVR) and temporal attenuation (TAR) do to frames and to motion.

    python -m benchmarks.learning.instructvideo [--arms …] [--seeds 0] [--overrides run.steps=10 …]
    python -m benchmarks.learning.instructvideo --docs     # the results -> the table in docs/instructvideo.md, the plot

Every arm is `configs/methods/instructvideo.yaml` with other frames rewarded, on the same clips, seeds and steps. The
judge is the exact checker, which is never trained on: `scene` sees frames alone, `motion` the clip. One process and
thread. Results are merged into `benchmarks/results/instructvideo.json`; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
import torch

from benchmarks import marked_block
from benchmarks.learning import methods
from benchmarks.learning.samples import ROOT
from pipeline.core.files import atomic_write
from pipeline.core.statistics import estimate_of_means, with_error

RECIPE = "instructvideo"
RESULTS = ROOT / "benchmarks/results/instructvideo.json"
DOCS, PICTURE = ROOT / "docs/instructvideo.md", ROOT / "docs/images/instructvideo.png"
BEGIN, END = "<!-- ablation: begin (benchmarks.learning.instructvideo --docs) -->", "<!-- ablation: end -->"
_SEGMENTS = "rewards.clip.segments"
ARMS: dict[str, list[str]] = {
    "SegVR and TAR": [],  # the recipe
    "SegVR alone": [f"{_SEGMENTS}.attenuation=0"],
    "all frames": [f"{_SEGMENTS}.count=9", f"{_SEGMENTS}.attenuation=0"],
    # All nine are drawn, and all but the middle one weigh nothing.
    "one fixed frame": [f"{_SEGMENTS}.count=1", f"{_SEGMENTS}.frames=9", f"{_SEGMENTS}.attenuation=50"],
}


def runs() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def measure(arm: str, seed: int, overrides: list[str]) -> None:
    """Adds a run to the results, unless it is there."""
    done = runs()
    if any((run["arm"], run["seed"], run["asked"]) == (arm, seed, overrides) for run in done):
        return
    result = {"arm": arm, "asked": overrides, **methods.run(RECIPE, seed, [*ARMS[arm], *overrides])}
    atomic_write(RESULTS, (json.dumps([*done, result], indent=1) + "\n").encode())
    rises = ", ".join(f"{name} {rise(result, name).mean():+.3f}" for name in result["rewards"])
    print(f"{arm}, seed {seed}: {rises} ({result['wall_s']:.0f} s)", file=sys.stderr, flush=True)


def rise(run: dict[str, Any], reward: str) -> np.ndarray:
    """After minus before, by held-out prompt."""
    values = run["rewards"][reward]
    return np.subtract(values["after"], values["before"])


def by_arm(done: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm, in the order of `ARMS`; only those with the overrides of the last run."""
    return {
        arm: found
        for arm in ARMS
        if (found := [r for r in done if r["arm"] == arm and r["asked"] == done[-1]["asked"]])
    }


def table(done: list[dict[str, Any]]) -> str:
    """Markdown. Standard errors are paired over held-out prompts, of the mean over seeds."""
    rewards = list(done[0]["rewards"])
    lines = ["| frames rewarded | " + " | ".join(rewards) + " | seeds |", "|---" * (len(rewards) + 2) + "|"]
    for arm, of_arm in by_arm(done).items():
        cells = []
        for reward in rewards:
            rises = np.mean([rise(run, reward) for run in of_arm], axis=0)
            before = np.mean([run["rewards"][reward]["before"] for run in of_arm])
            estimate = estimate_of_means(rises)
            cells.append(f"{before:.3f}, {with_error(estimate.mean, estimate.se or 0.0, 3, '+')}")
        lines.append(f"| {arm} | {' | '.join(cells)} | {len(of_arm)} |")
    return "\n".join(lines)


def plot(done: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = by_arm(done)
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for number, (reward, colour) in enumerate((("scene", "tab:blue"), ("motion", "tab:orange"))):
        estimates = [estimate_of_means(np.mean([rise(r, reward) for r in found], axis=0)) for found in arms.values()]
        places = np.arange(len(arms)) + 0.38 * number
        means, errors = [e.mean for e in estimates], [e.se or 0.0 for e in estimates]
        axis.bar(places, means, 0.36, yerr=errors, color=colour, capsize=2, label=f"{reward} (never trained on)")
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.set_xticks(np.arange(len(arms)) + 0.19, list(arms), fontsize=8)
    axis.set(ylabel="rise, held-out prompts (± s.e.)")
    axis.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=110)


def write_docs() -> None:
    done = runs()
    plot(done)
    marked_block.renew(DOCS, BEGIN, END, table(done))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--docs", action="store_true", help="run nothing: write the table and the plot")
    options = parser.parse_args()
    if options.docs:
        write_docs()
        return 0
    torch.set_num_threads(1)
    for seed in options.seeds:
        for arm in options.arms:
            measure(arm, seed, options.overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
