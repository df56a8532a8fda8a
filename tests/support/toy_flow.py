"""A 2-D Gaussian flow with a trainable velocity, and its reward: closeness to a point."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.rl.samplers import transition

GRID = [1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1, 0.0]


TARGET = torch.tensor([1.5, -1.0])


class Flow(torch.nn.Module):
    """Exact velocity of N(0, 1) data plus a small network that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
        torch.nn.init.zeros_(self.net[2].weight)
        torch.nn.init.zeros_(self.net[2].bias)

    def forward(self, x: torch.Tensor, t: float) -> torch.Tensor:
        exact = (2 * t - 1) / ((1 - t) ** 2 + t**2) * x
        return exact + self.net(torch.cat([x, torch.full((len(x), 1), t)], dim=1))


def reward(x: torch.Tensor) -> np.ndarray:
    return -(x - TARGET).norm(dim=1).numpy()


@torch.no_grad()
def ode_reward(model: Flow) -> float:
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(99))
    for t, t_next in zip(GRID, GRID[1:], strict=False):
        x = transition("ode", 0.0, "flow", x, model(x, t), t, t_next, GRID[1]).mean
    return float(reward(x).mean())
