"""Rewards that can be hacked and rewards that cannot, trained on purpose: what the verdict says, and how early.

    python -m benchmarks.learning.hacks [CASE …] [--seeds 0 1 2] [--steps 24] [--every 2]
    python -m benchmarks.learning.hacks --table         # the results -> the table in docs/trust.md
    python -m benchmarks.learning.hacks brightness --takes FOLDER     # also keeps held-out takes, first and last

Each case trains a shipped generator in this one process and judges it as a run does: the same records, guards and
verdict. The scene checker is gold: in a hack it has weight 0 and never trains. Each verdict is shown twice, with the
gold and by the guards alone, as a run without a gold reward would have it. Results are merged into
`benchmarks/results/hacks.json`; a case, seed, steps and interval that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.learning.samples import CONFIGS, ROOT, Loop
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.files import atomic_write
from pipeline.runs.verdict import judge, tolerances

RESULTS = ROOT / "benchmarks/results/hacks.json"
HERE = "benchmarks/learning/hackable_rewards.py"
FREE = "objective.kl_beta=0"  # nothing holds the policy to where it began
GOLD = "rewards.scene.weight=0"
# Rewards are scaled so that a group's spread resembles the scene checker's; nothing else is tuned.
CASES: dict[str, tuple[str, list[str]]] = {
    "brightness": ("image", [GOLD, f"rewards.proxy.scorer={HERE}:brightness", FREE]),
    "jpeg": ("image", [GOLD, "rewards.proxy.scorer=jpeg_compressibility", FREE]),
    "redness": ("image", [GOLD, f"rewards.proxy.scorer={HERE}:redness", FREE]),
    "any motion": (
        "video", [GOLD, "rewards.motion.weight=0", f"rewards.proxy.scorer={HERE}:any_motion", FREE],
    ),
    "honest image": ("image", []),
    "honest video": ("video", []),
}  # fmt: skip


def config(case: str, seed: int, steps: int, every: int) -> Config:
    generator, overrides = CASES[case]
    fixed = [f"run.seed={seed}", f"run.steps={steps}", f"evaluation.every={every}", "generator.compile=false"]
    fixed += ["evaluation.prompts=32", "evaluation.takes_per_prompt=2", "evaluation.batch=32"]
    return load_config(ROOT / CONFIGS[generator], [*overrides, *fixed])


def run(case: str, seed: int, steps: int, every: int, takes: Path | None = None) -> dict[str, Any]:
    """Trains one case. `records`: its evaluations; `guard_s`, `step_s`: seconds spent on guards and on a step."""
    cfg = config(case, seed, steps, every)
    loop = Loop(cfg)
    records = [{"step": 0, "tag": "train", **loop.record()}]
    _keep(loop, takes, case, 0)
    seconds = 0.0
    for step in range(1, steps + 1):
        started = time.perf_counter()
        loop.step(step - 1)
        seconds += time.perf_counter() - started
        if step % every == 0 or step == steps:
            records.append({"step": step, "tag": "train", **loop.record()})
            _keep(loop, takes, case, step)
            print(f"{case} seed {seed} step {step}: {verdicts(cfg, records)[-1]}", file=sys.stderr, flush=True)
    return {"case": case, "seed": seed, "steps": steps, "every": every, "records": records,
            "step_s": round(seconds / steps, 3)}  # fmt: skip


def _keep(loop: Loop, folder: Path | None, case: str, step: int) -> None:
    import numpy as np

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        takes = np.stack([loop.takes_of_prompt[index] for index in sorted(loop.takes_of_prompt)])
        np.savez_compressed(folder / f"{case.replace(' ', '-')}-{step:04d}.npz", takes=takes)


def verdicts(cfg: Config, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per evaluation after the first: its step, the verdict, and that of a run without the gold."""
    found = []
    for count in range(2, len(records) + 1):
        trained = {name: weight for name, weight in cfg.reward_weights.items() if weight}
        verdict = judge(records[:count], cfg.reward_weights, tolerances(cfg))
        blind = judge(records[:count], trained, tolerances(cfg))
        found.append({"step": records[count - 1]["step"], "verdict": verdict.text, "without gold": blind.text})
    return found


def _finished(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("case", "seed", "steps", "every"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=2, help="steps between evaluations")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--takes", type=Path, help="folder for the held-out takes of every evaluation")
    options = parser.parse_args()
    for seed in options.seeds:
        for case in options.cases or CASES:
            if (case, seed, options.steps, options.every) in map(_key, _finished(options.out)):
                continue
            result = run(case, seed, options.steps, options.every, options.takes)
            results = [*_finished(options.out), result]
            atomic_write(options.out, (json.dumps(results) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
