"""What a step of a quickstart cannot do without: bare denoiser passes and VAE decodes, each at its best batch size.

Run once per core at the same time, as the workers of a run are: cores share caches and memory.

    python -m benchmarks.bare configs/quickstart.yaml
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.plain_loop import PlainLoop
from pipeline.config_io import load_config
from pipeline.plan import train_work
from pipeline.types import GroupWork

REPEATS = 4


def seconds_of(call: Callable[[], object]) -> float:
    """Median wall time of a call, after one that warms up."""
    call()
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return float(np.median(found))


def bare(loop: PlainLoop) -> dict[str, float]:
    """Seconds per take of `forward`, `forward_backward` and `decode` at their best batch sizes (also returned), and
    `step_s`: seconds of one optimisation step's passes on one core. Then, at these sizes, the same under `compiled_`:
    with the compiled blocks and the layout of convolutions that a run has."""
    cfg = loop.cfg
    work = train_work(cfg, 0, 0, loop.prompts[0])
    takes = work.takes
    with torch.no_grad():
        latents, _ = loop.rollout(work)
    result: dict[str, float] = {}

    def seconds_per_take(call: Callable[[torch.Tensor], object], size: int) -> float:
        return seconds_of(partial(call, torch.cat([latents] * -(-size // takes))[:size])) / size

    def best(name: str, sizes: list[int], call: Callable[[torch.Tensor], object]) -> None:
        for size in sizes:
            per_take = seconds_per_take(call, size)
            if per_take < result.get(name, np.inf):
                result.update({name: per_take, f"{name}_batch": size})

    def forward(x: torch.Tensor) -> None:
        loop.velocity(loop.denoiser, x, 0.5, work.prompts[0].text)

    def decode(x: torch.Tensor) -> None:
        loop.pipe.vae.decode(x, return_dict=False)

    def forward_backward(x: torch.Tensor) -> None:
        loop.velocity(loop.denoiser, x, 0.5, work.prompts[0].text).square().mean().backward()

    sizes = [takes // 2, takes, 2 * takes, 3 * takes]
    with torch.no_grad():
        best("forward", sizes, forward)
        best("decode", sizes[:2], decode)
    best("forward_backward", sizes, forward_backward)
    result["step_s"] = _step_s(loop, work, result, "")
    loop.speed_up()
    with torch.no_grad():
        result["compiled_forward"] = seconds_per_take(forward, int(result["forward_batch"]))
        result["compiled_decode"] = seconds_per_take(decode, int(result["decode_batch"]))
    result["compiled_forward_backward"] = seconds_per_take(forward_backward, int(result["forward_backward_batch"]))
    result["compiled_step_s"] = _step_s(loop, work, result, "compiled_")
    return result


def _step_s(loop: PlainLoop, work: GroupWork, per_take: dict[str, float], kind: str) -> float:
    cfg = loop.cfg
    drawn = cfg.algorithm.groups_per_step * work.takes
    trained = drawn * len(work.sampling.trained_steps)
    reference = trained if cfg.algorithm.kl_beta > 0 else 0
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
    print(json.dumps(bare(PlainLoop(load_config(args.config, args.overrides), threads=1))))


if __name__ == "__main__":
    main()
