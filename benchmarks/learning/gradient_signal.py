"""How much of a policy gradient is signal, by sampler step: before a run, in minutes, what seeds of runs show in hours.

    python -m benchmarks.learning.gradient_signal configs/methods/grpo.yaml [KEY=VALUE …] [--groups 40]

Draws groups with the starting policy and takes the gradient of every trained step apart, summed over the even and over
the odd groups. The two halves saw different prompts and noise, so what they have in common is signal. Reported per step
and for their sum, in the metric that Adam trains in (each parameter divided by the rms of its gradient over groups):
the cosine between the halves, and signal^2 / noise^2 of one group. `share` is the step's part of the raw gradient's
variance.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning.samples import Loop
from pipeline.config.load import load_config
from pipeline.core.types import GroupBatch
from pipeline.generators import adapters


class _Moments:
    """Of one step's gradients over groups: the sums of both halves, and the sum of squares."""

    def __init__(self) -> None:
        self.halves: list[torch.Tensor | float] = [0.0, 0.0]
        self.squares: torch.Tensor | float = 0.0

    def add(self, gradient: torch.Tensor, half: int) -> None:
        self.halves[half] = self.halves[half] + gradient
        self.squares = self.squares + gradient.square()


def gradients(loop: Loop, batch: GroupBatch) -> dict[int, torch.Tensor]:
    """Sampler step -> its gradient [parameters], of one group."""
    replica, found = loop.learner.replicas[0], defaultdict[int, Any](float)
    parameters = list(adapters.trainable(replica.trained).values())
    for part in range(len(batch.held.parts)):
        for call in replica.micro_batches(batch.held, part):
            for parameter in parameters:
                parameter.grad = None
            replica.loss(batch, call, False).total.sum().backward()
            gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            found[call.recorded.index] += torch.cat([g.flatten() for g in gradient])
    return found


def summary(moments: dict[int, _Moments], groups: int) -> list[dict[str, float | str]]:
    """A row per step, and one of all steps together."""
    total = _Moments()
    for each in moments.values():
        total.halves = [a + b for a, b in zip(total.halves, each.halves, strict=True)]
        total.squares = total.squares + each.squares
    rms = torch.as_tensor(total.squares).div(groups).sqrt().add(1e-12)
    variance = float(torch.as_tensor(total.squares).sum())

    def row(name: str, each: _Moments) -> dict[str, float | str]:
        first, second = (torch.as_tensor(half) / rms for half in each.halves)
        noise = float((torch.as_tensor(each.squares) / rms.square()).sum()) / groups
        signal = float(first @ second) * 4.0 / groups**2
        return {
            "step": name,
            "cosine": float(first @ second / (first.norm() * second.norm())),
            "signal": signal / noise,
            "share": float(torch.as_tensor(each.squares).sum()) / variance,
        }

    return [*(row(str(step), moments[step]) for step in sorted(moments)), row("all", total)]


def measure(config: Path, overrides: list[str], groups: int) -> list[dict[str, float | str]]:
    plain = ["generator.compile=false", "learner.replicas=1", "learner.micro_batch=0", "step.groups=1"]
    loop = Loop(load_config(config, [*overrides, *plain]))
    moments: dict[int, _Moments] = defaultdict(_Moments)
    for number in range(groups):
        (batch,) = loop.draw(0)
        for step, gradient in gradients(loop, batch).items():
            moments[step].add(gradient, number % 2)
    return summary(moments, groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--groups", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for row in measure(options.config, options.overrides, options.groups):
        print(json.dumps({name: round(v, 5) if isinstance(v, float) else v for name, v in row.items()}), flush=True)


if __name__ == "__main__":
    main()
