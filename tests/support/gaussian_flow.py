"""A flow whose exact velocity is known, because its data are Gaussian: samplers are simulated on it in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.rl.samplers import Transition

M, S = 0.5, 0.6  # data N(M, S^2)

# (x, velocity, t, t_next, cap) -> transition; `cap`: the second time of the grid, see samplers.base.NoiseLevels
Step = Callable[[torch.Tensor, torch.Tensor, float, float, float], Transition]


def exact_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """v = eps^ - x0^ for x_t = (1 - t) x0 + t eps with x0 ~ N(M, S^2)."""
    variance = (1 - t) ** 2 * S**2 + t**2
    centred = x - (1 - t) * M
    return t / variance * centred - (M + (1 - t) * S**2 / variance * centred)


def simulate(step: Step, steps: int = 200, paths: int = 40_000) -> torch.Tensor:
    """Draws `paths` samples [paths, 1] from noise to data; the last step is the ODE, as in a run."""
    generator = torch.Generator().manual_seed(0)
    grid = [1.0 - i / steps for i in range(steps)] + [0.0]
    x = torch.randn(paths, 1, generator=generator, dtype=torch.float64)
    for i in range(steps):
        velocity = exact_velocity(x, grid[i])
        if i == steps - 1:
            return x + velocity * (grid[i + 1] - grid[i])
        moved = step(x, velocity, grid[i], grid[i + 1], grid[1])
        x = moved.mean + moved.std * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x
