"""A finished run's folder with made-up numbers and real media files: what the report and the commands read."""

import json
import time
from pathlib import Path

import numpy as np
from fake_checkpoint import fake_config

from pipeline.config.load import to_yaml
from pipeline.core.takes_table import save_takes
from pipeline.core.types import Media, PromptItem, RewardScores
from pipeline.rewards.segments import log_weights, pick_frames


def moving_square(good: bool, frames: int, seed: int) -> np.ndarray:
    """uint8 [F, 48, 48, 3]: a coloured square that moves; a bad one flickers in its colour."""
    rng = np.random.default_rng(seed)
    clip = np.full((frames, 48, 48, 3), 235, np.uint8)
    colour = rng.integers(0, 200, 3)
    for f in range(frames):
        left = 4 + 3 * f
        shade = colour if good else rng.integers(0, 256, 3)
        clip[f, 16:32, left : left + 14] = shade
    return clip


def make_run(root: Path, steps: int = 40, frames: int = 9, finished: bool = True, name: str = "quickstart-1") -> Path:
    """Returns the run folder. steps = 0: a run that has just begun."""
    cfg = fake_config(
        root,
        generator={"num_frames": frames},
        rewards={
            "scene": {"scorer": "jpeg_compressibility"},
            "motion": {"scorer": "jpeg_incompressibility", "weight": 0.5},
        },
        run={"name": name, "steps": 40},
    )
    run = root / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(cfg))
    if not steps:
        return run
    rng = np.random.default_rng(0)
    start = time.time() - 300
    with open(run / "metrics.jsonl", "w") as file:
        file.write(json.dumps({"step": 0, "time": start - 9, "heldout/mean": 0.55}) + "\n")  # the first evaluation
        for step in range(steps):
            level = 0.55 + 0.3 * (1 - np.exp(-step / 15))
            row = {
                "step": step, "time": start + 7 * step, "reward/mean": level + rng.normal(0, 0.02), "reward/std": 0.2,
                "reward/scene": level - 0.1 + rng.normal(0, 0.02), "reward/motion": level / 2 + rng.normal(0, 0.02),
                "zero_std_ratio": abs(rng.normal(0.05, 0.03)), "loss": rng.normal(0, 1e-3), "policy_loss": 1e-4,
                "kl": 1e-4 * step, "ratio/mean": 1 + rng.normal(0, 1e-5), "ratio/min": 1 - 2e-4, "ratio/max": 1 + 3e-4,
                "ratio/max_abs_log": abs(rng.normal(0, 1e-6)), "clip/low": 0.1, "clip/high": 0.12,
                "grad_norm": abs(rng.normal(1, 0.2)), "lr": 1e-4, "advantage/mean_abs": 0.8, "time/step": 7.0,
                "time/rollout": 3 + rng.normal(0, 0.2), "time/score": 0.3, "time/learn": 3.2 + rng.normal(0, 0.2),
                "time/sync": 0.1, "takes_per_s": 12 + rng.normal(0, 1),
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    evals = [step for step in (0, 20, 40) if step <= steps]
    with open(run / "evals.jsonl", "w") as file:
        for step in evals:
            mean = 0.55 + 0.3 * (1 - np.exp(-step / 15))
            rewards = {"scene": {"mean": mean - 0.1, "se": 0.02}, "motion": {"mean": mean / 2, "se": 0.01}}
            record = {"step": step, "tag": "train", "mean": mean, "se": 0.02, "n": 64, "rewards": rewards}
            record["prompt_means"] = [mean - 0.02 + 0.01 * (step > 0), mean + 0.02 - 0.01 * (step > 0)]
            file.write(json.dumps(record) + "\n")
    prompts = [PromptItem(index=i, text=f"a red circle moving right slowly, number {i}") for i in range(6)]
    picks = pick_frames(frames, 4, 1, None)
    for step in evals:
        media = Media(frames=np.stack([moving_square(step > 0, frames, p.index) for p in prompts]), fps=8.0)
        values = rng.uniform(0.2, 0.6, (6, len(picks))).astype(np.float32) + 0.3 * (step > 0)
        weights = np.exp(log_weights(picks, frames, 1.0))[:, 0].astype(np.float32)
        weights /= weights.sum()
        segments = dict(segment_values=values, segment_weights=weights, segment_frames=picks) if frames > 1 else {}
        scores = {
            "scene": RewardScores(values=(values * weights).sum(axis=1), **segments),
            "motion": RewardScores(values=values.mean(axis=1)),
        }
        save_takes(
            run / "eval" / f"step-{step:06d}",
            media,
            prompts,
            [7] * 6,
            step,
            scores,
            weights={"scene": 1, "motion": 0.5},
        )
    if finished:
        heldout = {
            "before": {"mean": 0.55, "se": 0.02, "n": 64},
            "after": {"mean": 0.83, "se": 0.015, "n": 64},
            "difference": {"mean": 0.28, "se": 0.025, "ci95": 0.05, "n": 64},
            "rewards": {
                n: {"before": {"mean": 0.5, "se": 0.02}, "after": {"mean": 0.8, "se": 0.02}}
                for n in ("scene", "motion")
            },
        }
        summary = {
            "heldout": heldout, "steps": steps, "takes": 3840, "wall_s": 301.5, "peak_rss_mb": 3900,
            "status": "finished", "seeds": {"run": 0, "evaluation": 1234},
            "groups": {"admitted": 480, "trained": 478, "filtered": 2, "failed": 0},
            "versions": {"python": "3.11.7", "torch": "2.13.0"}, "export": "export",
        }  # fmt: skip
        (run / "summary.json").write_text(json.dumps(summary))
    return run
