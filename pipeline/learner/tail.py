"""The end of a group's denoising chain, run again with gradients: from a recorded sample to x0.

Rollout workers draw the steps before it without gradients and leave its beginning in an ordinary trajectory, whose
trained steps are the tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pipeline.core.types import Trajectory
from pipeline.generators.replay.chain import DenoisingChain, Noise
from pipeline.generators.replay.replayer import Replayer
from pipeline.rl.objectives.micro_batch import Denoised, Finished


class ReplayedTail:
    """Some takes of a trajectory part, over all its trained steps. `replayer`: of the part; it says whose modules."""

    def __init__(self, trajectory: Trajectory, replayer: Replayer, takes: slice) -> None:
        self.takes = range(replayer.total)[takes]
        self.chain = DenoisingChain(
            replace(trajectory, parts=(replayer.part,)), replayer.modules, replayer.device, [replayer]
        )
        self._group, self._first_take = trajectory.group, replayer.part.start
        self._steps = len(self.chain.levels)
        self._drawn_noise: dict[int, torch.Tensor] = {}  # level -> what an LCM's own sampler drew

    def finish(self, jump: bool, detach: bool = False) -> Finished:
        """See `MicroBatch.finish`."""
        errors: list[torch.Tensor] = []

        def compare(j: int, reached: torch.Tensor) -> None:
            gap = (reached - self.chain.drawn(j, self.takes).x_next).float()
            if (chosen := self.chain.chosen(j, self.takes)) is not None:
                gap = gap * chosen
            errors.append(gap.abs().max() / (j + 1))  # rounding adds up from step to step

        noisy_jump = jump and self.chain.spec.consistency  # the sampler's own noise is not drawn
        clean = self.chain.run(
            self.chain.state(0, self.takes),
            self.takes,
            0,
            self._steps,
            noise=self._sampler_noise(),
            jump=jump,
            detach=detach,
            reached=None if noisy_jump else compare,
        )
        return Finished(clean, torch.stack(errors) if errors else clean.new_zeros(1))

    def _sampler_noise(self) -> Noise | None:
        """That of the rollout, where the sampler itself draws some (LCM)."""
        if not self.chain.spec.consistency:
            return None

        def drawn(j: int, _x: torch.Tensor) -> torch.Tensor:
            if j not in self._drawn_noise:
                self._drawn_noise[j] = self.chain.drawn_noise(j, self.takes)
            return self._drawn_noise[j]

        return drawn

    def denoise_again(self, x0: torch.Tensor, seed: Sequence[int]) -> torch.Tensor:
        """See `MicroBatch.denoise_again`. `seed`: of the noise, beside the group and the take."""
        last = self._steps - 1
        noise = torch.stack([self._noise(x0[0], (*seed, self._first_take + take)) for take in self.takes])
        x = self.chain.noised(last, x0.detach(), noise)
        return self.chain.run(x, self.takes, last, last + 1, jump=True)

    def noise_of_takes(self, like: torch.Tensor, run_seed: int) -> torch.Tensor:
        """See `MicroBatch.noise_of_takes`. `like`: one take."""
        return torch.stack([self._noise(like, (run_seed, self._first_take + take)) for take in self.takes])

    def denoise(
        self, j: int, x0: torch.Tensor, noise: torch.Tensor, conditions: Sequence[int] | None = None
    ) -> Denoised:
        """See `MicroBatch.denoise`."""
        x = self.chain.noised(j, x0, noise)
        owners = self.takes if conditions is None else [self.takes[row] for row in conditions]
        output = self.chain.output(j, x, owners).float()
        error = (output - self.chain.target(j, x0, noise)).pow(2).flatten(1).mean(1)
        return Denoised(error, self.chain.clean_of(j, x, output))

    def _noise(self, like: torch.Tensor, seed: Sequence[int]) -> torch.Tensor:
        number = int(np.random.SeedSequence([*seed, self._group, 0xD7]).generate_state(1)[0])
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(number)).to(like.device)
