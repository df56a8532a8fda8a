"""The map between the scheduler's sample and what the VAE decodes: a permutation with scale and shift."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentMap:
    """Found by value when a pipeline is probed. A take's latents are [r, ...], r entries of the VAE's batch: its frames
    where a VAE decodes frame by frame, else one."""

    positions: np.ndarray  # int32 [r, ...]: position in the take's flattened sample; -1: set by a condition
    scale: np.ndarray  # float32, broadcast to `positions`
    shift: np.ndarray  # the same
    sample_shape: tuple[int, ...]  # of one take
    arguments: dict[str, Any] = field(default_factory=dict)  # of vae.decode besides the latents

    @property
    def whole(self) -> bool:
        """Whether the sample decides all latents, so that they can be had from it alone."""
        return bool((self.positions >= 0).all())

    @property
    def invertible(self) -> bool:
        """Whether the latents decide all of the sample."""
        held = self.positions[self.positions >= 0]
        return len(np.unique(held)) == int(np.prod(self.sample_shape))

    @property
    def per_frame(self) -> bool:
        """Whether the VAE decodes the frames of a clip one by one."""
        return self.positions.ndim == 4 and self.positions.shape[0] > 1

    def latents(self, sample: torch.Tensor) -> torch.Tensor:
        """Samples [K, ...] -> what the VAE decodes, float32 [K, r, ...]; gradients pass. Raises ValueError where the
        map is not `whole`, or another shape was probed."""
        if not self.whole or sample.shape[1:] != self.sample_shape:
            raise ValueError(f"latents of a sample {list(sample.shape[1:])} are not known from it alone")
        index = torch.from_numpy(self.positions).to(sample.device).flatten().long()
        values = sample.float().flatten(1)[:, index].reshape(-1, *self.positions.shape)
        return values * self._tensor(self.scale, sample) + self._tensor(self.shift, sample)

    def sample(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse: latents [K, r, ...] -> samples, float32 [K, ...]. Raises ValueError where there is none."""
        if not self.invertible or latents.shape[1:] != self.positions.shape:
            raise ValueError(
                f"latents {list(latents.shape[1:])} do not decide the sample; {self.positions.shape} would"
            )
        return self.arrange((latents.float() - self._tensor(self.shift, latents)) / self._tensor(self.scale, latents))

    def arrange(self, values: torch.Tensor) -> torch.Tensor:
        """Values in the order of latents [K, r, ...] -> the same values in that of samples [K, ...]."""
        index = torch.from_numpy(self.positions).to(values.device).flatten().long()
        held = index >= 0
        sample = values.new_zeros(values.shape[0], int(np.prod(self.sample_shape)))
        sample[:, index[held]] = values.flatten(1)[:, held]
        return sample.reshape(-1, *self.sample_shape)

    @staticmethod
    def _tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(array).to(like.device)
