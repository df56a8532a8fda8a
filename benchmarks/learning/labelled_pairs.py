"""Labelled pairs for `configs/methods/dpo-offline.yaml`: takes of shapes-image, drawn and judged before any training.

    python -m benchmarks.learning.labelled_pairs --out shapes-pairs [--pairs 2000] [--flipped 0.2] [--seed 0]

Two takes of a training prompt are drawn by the generator as it ships, and the exact scene checker says which one is
better; takes that it finds equal are drawn again with other seeds. Of all answers the share `--flipped` is turned
round, as of a rater who errs. FOLDER gets the pictures, and `pairs.parquet` as `rushes label` would write it.
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


def judged_pairs(cfg: Config, seed: int) -> Iterator[tuple[PromptItem, Media, np.ndarray]]:
    """(prompt, two takes, their scores) without end, all prompts in turn; pairs of equal scores are left out."""
    policy = Policy.load(cfg, "cpu", 1)
    (name,) = cfg.rewards
    scorer = build_reward(name, cfg.rewards[name])
    prompts = load_prompts(cfg.prompts.train)
    while True:
        for work in sample_works(cfg, prompts, takes=2, seed=seed):
            media = policy.rollout(work).media
            scores = scorer.run(media, work.prompts, None).values
            for k in range(0, work.takes, 2):
                if scores[k] != scores[k + 1]:
                    yield work.prompts[k], Media(frames=media.frames[k : k + 2], fps=media.fps), scores[k : k + 2]
        seed += 1


def write_pairs(folder: Path, pairs: int, flipped: float, seed: int) -> Path:
    """Returns the table."""
    cfg = load_config(RECIPE, [f"evaluation.batch={BATCH}"])
    folder.mkdir(parents=True, exist_ok=True)
    turned = np.random.default_rng(seed).permutation(pairs) < round(flipped * pairs)
    rows = []
    for number, (prompt, media, scores) in zip(range(pairs), judged_pairs(cfg, 1000 * seed), strict=False):
        names = [write_media(folder / f"{number:05d}-{side}", media, k).name for k, side in enumerate("ab")]
        label = int(np.sign(scores[0] - scores[1])) * (-1 if turned[number] else 1)
        rows.append(
            LabelledPair(row=number + 1, a=names[0], b=names[1], label=label, prompt=prompt.text, origin="scene")
        )
    write_labelled_pairs(folder / TABLE, rows)
    return folder / TABLE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--flipped", type=float, default=0.2, help="share of the answers that is turned round")
    parser.add_argument("--seed", type=int, default=0, help="of the takes, and of which answers are turned round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(write_pairs(options.out, options.pairs, options.flipped, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
