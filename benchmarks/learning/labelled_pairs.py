"""Labelled pairs for `configs/methods/dpo-offline.yaml`: takes of shapes-image, drawn and judged before any training.

    python -m benchmarks.learning.labelled_pairs --out shapes-pairs [--pairs 2000] [--of 4] [--flipped 0.2] [--seed 0]

`--of` takes of a training prompt are drawn by the generator as it ships, and the best and the worst are a pair, by the
exact scene checker; takes that it finds equal are drawn again with other seeds. Of all answers the share `--flipped` is
turned round, as of a rater who errs. FOLDER gets the pictures, and `pairs.parquet` as `rushes label` would write it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.learning.samples import ROOT
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.labelled_pairs import LabelledPair, write_labelled_pairs
from pipeline.core.media import write_media
from pipeline.core.prompts import load_prompts
from pipeline.core.types import Media, PromptItem
from pipeline.generators.policy import Policy
from pipeline.rewards.runner import build_reward
from pipeline.rl.group_plan import sample_works

RECIPE = ROOT / "configs/methods/dpo-online.yaml"  # its generator, prompts and reward
TABLE = "pairs.parquet"
BATCH = 64  # takes drawn at once


def judged_pairs(cfg: Config, of: int, seed: int) -> Iterator[tuple[PromptItem, Media]]:
    """(prompt, the best take and the worst of some) without end, all prompts in turn."""
    policy = Policy.load(cfg, "cpu", 1)
    (name,) = cfg.rewards
    scorer = build_reward(name, cfg.rewards[name])
    prompts = load_prompts(cfg.prompts.train)
    while True:
        for work in sample_works(cfg, prompts, takes=of, seed=seed):
            media = policy.rollout(work).media
            scores = scorer.run(media, work.prompts, None).values
            for start in range(0, work.takes, of):
                order = start + np.argsort(-scores[start : start + of], kind="stable")
                if scores[order[0]] > scores[order[-1]]:
                    yield work.prompts[start], Media(frames=media.frames[order[[0, -1]]], fps=media.fps)
        seed += 1


def write_pairs(folder: Path, pairs: int, of: int, flipped: float, seed: int) -> Path:
    """Returns the table."""
    cfg = load_config(RECIPE, [f"evaluation.batch={of * max(1, BATCH // of)}"])  # whole sets of takes
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    turned, swapped = rng.permutation(pairs) < round(flipped * pairs), rng.random(pairs) < 0.5
    rows = []
    for number, (prompt, media) in zip(range(pairs), judged_pairs(cfg, of, 1000 * seed), strict=False):
        sides = "ba" if swapped[number] else "ab"  # of the best take and of the worst
        best, worst = (write_media(folder / f"{number:05d}-{side}", media, k).name for k, side in enumerate(sides))
        a, b = (worst, best) if swapped[number] else (best, worst)
        label = -1 if swapped[number] != turned[number] else 1
        rows.append(LabelledPair(row=number + 1, a=a, b=b, label=label, prompt=prompt.text, origin="scene"))
    write_labelled_pairs(folder / TABLE, rows)
    return folder / TABLE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--of", type=int, default=4, help="takes of which the best and the worst are a pair")
    parser.add_argument("--flipped", type=float, default=0.2, help="share of the answers that is turned round")
    parser.add_argument("--seed", type=int, default=0, help="of the takes, and of which answers are turned round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(write_pairs(options.out, options.pairs, options.of, options.flipped, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
