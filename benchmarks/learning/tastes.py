"""Raters of opposite tastes, each served: one reward with two heads, and a run for each of its users.

    python -m benchmarks.learning.tastes [--folder FOLDER] [--pairs 200] [--steps 12] [--seed 0]

Ada finds the warmer one of two takes better (more red than blue), Bob the colder one; each errs once in ten. `rushes
fit-reward --heads 2` is fitted to both's answers, and the image quickstart learns from it as Ada's reward and as
Bob's, in this process. The warmth of takes of held-out prompts is measured before and after. Results go into
benchmarks/results/tastes.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning.people import BASE, CONFIG, PROMPTS, RESULTS, rushes
from benchmarks.learning.samples import ROOT, Loop
from pipeline.config.load import load_config
from pipeline.core.files import atomic_write
from pipeline.core.labelled_pairs import LabelledPair, write_labelled_pairs
from pipeline.core.media import read_media
from pipeline.core.statistics import estimate_of_means
from pipeline.core.takes_table import read_takes

TASTES = {"ada": 1.0, "bob": -1.0}
WARMTH = "def warmth(frames, prompt):\n    return float(frames[..., 0].mean() - frames[..., 2].mean()) / 255\n"


def warmth(frames: np.ndarray) -> float:
    """uint8 [..., 3] -> the mean of red minus that of blue."""
    return float(frames[..., 0].mean() - frames[..., 2].mean())


def label(takes: Path, count: int, errors: float, seed: int) -> None:
    """Both raters' answers to the first two takes of `count` prompts, as labels.parquet."""
    rng = np.random.default_rng(seed)
    by_prompt: dict[str, list[str]] = {}
    for row in read_takes(takes):
        by_prompt.setdefault(row["prompt"], []).append(row["path"])
    pairs = []
    for prompt, paths in list(by_prompt.items())[:count]:
        a, b = (warmth(read_media(takes / path).frames) for path in paths[:2])
        for rater, sign in TASTES.items():
            better = 1 if sign * (a - b) > 0 else -1
            better = -better if rng.random() < errors else better
            pairs.append(
                LabelledPair(row=len(pairs) + 1, a=paths[0], b=paths[1], label=better, prompt=prompt, rater=rater)
            )
    write_labelled_pairs(takes / "labels.parquet", pairs)


def train(folder: Path, user: str | None, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """What each reward's held-out mean was and is, with the standard error of the difference over prompts."""
    options = {"path": str(folder / "reward")} | ({} if user is None else {"user": user})
    overrides = [
        f"run.steps={steps}", f"run.seed={seed}", "rewards.scene.weight=0", "rewards.taste.scorer=fitted_clip",
        *(f"rewards.taste.args.{key}={value}" for key, value in options.items()),
        f"rewards.warmth.scorer={folder / 'own.py'}:warmth", "rewards.warmth.weight=0",
        "generator.compile=false",
    ]  # fmt: skip
    loop = Loop(load_config(ROOT / CONFIG, overrides))
    before = loop.evaluate()["rewards"]
    for step in range(steps):
        loop.step(step)
    after = loop.evaluate()["rewards"]
    return {name: _change(np.array(before[name]), np.array(after[name])) for name in before}


def _change(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    se = estimate_of_means(after - before).se or 0.0
    return {"before": round(float(before.mean()), 4), "after": round(float(after.mean()), 4), "se": round(se, 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tastes"))
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder.absolute()
    if not (folder / "takes/takes.parquet").exists():
        rushes("generate", CONFIG, "--prompts", PROMPTS, "--takes", 2, "--out", folder / "takes")
    label(folder / "takes", options.pairs, 0.1, options.seed)
    (folder / "own.py").write_text(WARMTH)
    if not (folder / "reward").exists():
        rushes("fit-reward", folder / "takes/labels.parquet", "--base", BASE, "--out", folder / "reward", "--heads", 2)
    fitted = json.loads((folder / "reward/fit.json").read_text())
    result: dict[str, Any] = {
        "pairs": fitted["pairs"], "steps": options.steps, "seed": options.seed,
        "held_out": {rater: share["mean"] for rater, share in fitted["by_rater"].items()}, "users": {},
    }  # fmt: skip
    for user in TASTES:
        result["users"][user] = train(folder, user, options.steps, options.seed)
        print(user, result["users"][user], file=sys.stderr, flush=True)
    atomic_write(RESULTS.with_name("tastes.json"), (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
