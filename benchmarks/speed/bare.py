"""What a step of a quickstart cannot do without: bare denoiser passes and VAE decodes, each at its best batch size.

Run once per core at the same time, as the workers of a run are: cores share caches and memory. Measures once for each
line that it reads.

    echo | python -m benchmarks.speed.bare configs/quickstart.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline.config.load import load_config
from pipeline.core.prompts import load_prompts
from pipeline.core.types import GroupWork
from pipeline.plain_loop import PlainLoop
from pipeline.rl.group_plan import train_work
from pipeline.rl.objectives import objective_of

REPEATS = 3


def seconds_of(call: Callable[[], object]) -> float:
    """Median wall time of a call, after one that warms up."""
    call()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def bare(loop: PlainLoop, compiled: PlainLoop) -> dict[str, float]:
    """Seconds per take of `forward`, `forward_backward` and `decode` at their best batch sizes (also returned), and
    `step_s`: seconds of one optimisation step's passes on one core. Then, at these sizes, the same of `compiled` under
    `compiled_`: with the compiled blocks and the layout of convolutions that a run has."""
    cfg = loop.cfg
    work = train_work(cfg, 0, 0, load_prompts(cfg.prompts.train)[0])
    takes = work.takes
    with torch.no_grad():
        latents = loop.rollout(work).latents
    text = work.prompts[0].text
    result: dict[str, float] = {}

    def calls(loop: PlainLoop) -> dict[str, Callable[[torch.Tensor], object]]:
        def forward_backward(x: torch.Tensor) -> None:
            loop.velocity(loop.denoiser, x, 0.5, text).square().mean().backward()

        return {
            "forward": torch.no_grad()(lambda x: loop.velocity(loop.denoiser, x, 0.5, text)),
            "decode": torch.no_grad()(lambda x: loop.pipe.vae.decode(x, return_dict=False)),
            "forward_backward": forward_backward,
        }

    def seconds_per_take(call: Callable[[torch.Tensor], object], size: int) -> float:
        return seconds_of(partial(call, torch.cat([latents] * -(-size // takes))[:size])) / size

    for name, call in calls(loop).items():
        sizes = [takes // 2, takes] if name == "decode" else [takes, 2 * takes, 3 * takes]
        by_size = {size: seconds_per_take(call, size) for size in sizes}
        result[f"{name}_batch"] = best = min(by_size, key=lambda size: by_size[size])
        result[name] = by_size[best]
    for name, call in calls(compiled).items():
        result[f"compiled_{name}"] = seconds_per_take(call, int(result[f"{name}_batch"]))
    for kind in ("", "compiled_"):
        result[f"{kind}step_s"] = _step_s(loop, work, result, kind)
    return result


def _step_s(loop: PlainLoop, work: GroupWork, per_take: dict[str, float], kind: str) -> float:
    cfg = loop.cfg
    drawn = cfg.step.groups * work.takes
    trained = drawn * len(work.sampling.trained_steps)
    nth = objective_of(cfg).requirements.reference_every
    reference = trained / nth if nth else 0
    return (
        (drawn * cfg.sampler.steps + reference) * per_take[f"{kind}forward"]
        + drawn * per_take[f"{kind}decode"]
        + trained * per_take[f"{kind}forward_backward"]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    cfg = load_config(args.config, args.overrides)
    loops = PlainLoop(cfg), PlainLoop(cfg, fast=True)
    for _ in sys.stdin:
        print(json.dumps(bare(*loops)), flush=True)


if __name__ == "__main__":
    main()
