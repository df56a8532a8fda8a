"""Noise grids of well-known schedulers, made by diffusers itself."""

from __future__ import annotations

import numpy as np
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from pipeline.generators.record.first_order import levels_from
from pipeline.rl.noise_grid import NoiseGrid


def _flow(steps: int, shift: float, sigmas: np.ndarray | None = None) -> NoiseGrid:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps, sigmas=sigmas)
    return NoiseGrid("flow", levels_from(scheduler, "flow", 0))


def ddim(steps: int) -> NoiseGrid:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(steps)
    return NoiseGrid("epsilon", levels_from(scheduler, "epsilon", 0))


GRIDS = {
    "shipped": _flow(8, 2.0),  # of both shipped generators
    "sd3": _flow(10, 3.0),
    "sd3 in 2 steps": _flow(2, 3.0),
    "sd3 in 4 steps": _flow(4, 3.0),
    "sd3 in 40 steps": _flow(40, 3.0),
    "linspace": _flow(10, 1.0, np.linspace(1.0, 0.1, 10)),
    "flux": _flow(28, 3.0, np.linspace(1.0, 1 / 28, 28)),
    "wan": _flow(20, 5.0),
    "sd1.5": ddim(50),
}
