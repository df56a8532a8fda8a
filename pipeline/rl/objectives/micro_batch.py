"""What an objective is given: some takes of a group at a noise level, and the policies to run on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pipeline.rl.samplers.base import Transition


@dataclass(frozen=True, slots=True)
class Pairs:
    """The compared takes of a group, as rows of its micro-batch: at each of its joined steps."""

    better: torch.Tensor  # int64 [P]
    worse: torch.Tensor  # int64 [P]
    weights: torch.Tensor  # float32 [P]
    gaps: torch.Tensor | None = None  # float32 [P], of the takes' rewards; None where only the order is known

    def per_take(self, values: torch.Tensor, takes: int) -> torch.Tensor:
        """Values [P] of the pairs as values [takes] with the same mean, which the learner takes over the takes."""
        rows = values.new_zeros(takes)
        return rows.index_add(0, self.better, values * (takes / max(1, len(values))))


@dataclass(frozen=True, slots=True)
class Drawn:
    """A recorded transition of b takes, as the rollout drew it."""

    x: torch.Tensor  # [b, ...] x_t, storage dtype
    x_next: torch.Tensor  # [b, ...]
    log_prob: torch.Tensor  # float32 [b], of x_next under the policy that drew it
    mean: torch.Tensor | None  # float32 [b, ...] of that policy, where the objective requires it


@dataclass(frozen=True, slots=True)
class Finished:
    """b takes whose recorded tail was run again."""

    clean: torch.Tensor  # [b, ...] x0, in a recorded sample's dtype; with gradients of the policy in training
    replay_error: torch.Tensor  # [steps], of each step: the largest difference from the rollout's sample, detached


@dataclass(frozen=True, slots=True)
class Denoised:
    """b finished takes that were noised to a level and denoised in one call, with gradients of the policy."""

    error: torch.Tensor  # float32 [b], mean |output - target|^2
    clean: torch.Tensor  # float32 [b, ...], x0 as the output predicts it


class MicroBatch(ABC):
    """The rows of one denoiser call: b takes of one group, at one trained step or at several joined ones; where the
    objective's unit is a trajectory or a tail, b takes over all trained steps.

    All tensors are on the learner's device.
    """

    @property
    @abstractmethod
    def advantages(self) -> torch.Tensor:
        """Float32 [b]. Raises RuntimeError where the signal gives none."""

    @property
    @abstractmethod
    def pairs(self) -> Pairs:
        """Of an objective that requires whole groups. Raises RuntimeError where the signal gives none."""

    @property
    @abstractmethod
    def is_stale(self) -> bool:
        """Whether the takes were drawn by an earlier version of the policy than the one that this step began with."""

    @property
    @abstractmethod
    def only_update(self) -> bool:
        """Whether the step has no other update, so that the policy is still the one that the step began with."""

    @abstractmethod
    def levels(self) -> list[tuple[slice, MicroBatch]]:
        """Each trained step's rows, in order, and the micro-batch of these rows alone. Of a trajectory all rows are of
        every step."""

    @abstractmethod
    def drawn(self) -> Drawn:
        """The rollout's transition, of one trained step. Raises TypeError where the step drew no noise."""

    @abstractmethod
    def transition(self, x: torch.Tensor, output: torch.Tensor) -> Transition:
        """The Gaussian of the next sample for the sample x [b, ...] and a model output [b, ...] of one trained step."""

    @abstractmethod
    def output(self, x: torch.Tensor) -> torch.Tensor:
        """The trained policy's guided prediction [b, ...] for the samples x [b, ...], with gradients."""

    @abstractmethod
    def reference_output(self, x: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        """The starting policy's, without gradients. `rows`: x are the samples of these rows only."""

    @abstractmethod
    def old_output(self, x: torch.Tensor) -> torch.Tensor:
        """The old policy's, without gradients; where the objective requires one."""

    @abstractmethod
    def rows_at_every(self, nth: int) -> list[slice]:
        """The rows at every nth trained step, a slice for each denoiser call; which steps changes with the group."""

    @abstractmethod
    def clean(self) -> torch.Tensor:
        """The finished takes x0 [b, ...], float32."""

    @abstractmethod
    def fresh_noise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise levels (float64 [b, 1, ...]) and new noise (float32 [b, ...]) to noise finished takes with, the same
        for all takes of a group: what they have in common cancels, since advantages sum to zero."""

    @abstractmethod
    def noised(self, x0: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x0 [b, ...] with noise of these levels, in the dtype of a recorded sample.

        Flow: (1 - sigma) x0 + sigma noise.
        """

    @abstractmethod
    def target(self, x0: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What a perfect model would predict for `noised(...)` [b, ...]. Flow: noise - x0."""

    @abstractmethod
    def clean_error_scale(self, sigma: torch.Tensor) -> torch.Tensor:
        """Float32, like sigma: by what an error of the output is multiplied to be one of the predicted x0."""

    @abstractmethod
    def replay_error(self) -> torch.Tensor | None:
        """How far a replayed deterministic step is from the rollout's, where this micro-batch is one that is compared
        (at the cost of a forward pass); else None."""

    # -- of a tail ------------------------------------------------------------------------------------------------

    @abstractmethod
    def finish(self, jump: bool = False, detach: bool = False) -> Finished:
        """Runs the trained steps again, from the first one's recorded sample. Each denoiser call is computed again in
        the backward pass.

        `jump`: the last of them goes to its x0 prediction. `detach`: no gradients through the denoiser's input.
        """

    @abstractmethod
    def reference_finish(self, jump: bool = False) -> torch.Tensor:
        """x0 [b, ...] as the starting policy makes it of the same sample, without gradients."""

    @abstractmethod
    def denoise_again(self, x0: torch.Tensor, number: int) -> torch.Tensor:
        """x0 [b, ...], noised to the last trained step and taken to its x0 prediction, with gradients of the policy
        but not to x0. `number`: of the noise, which is new for each take and number, the same after a resume."""

    @property
    @abstractmethod
    def steps_left(self) -> tuple[int, ...]:
        """Of each trained step: how many sampler steps lead from there to the finished take; 1 at the last one."""

    @abstractmethod
    def noise_of_takes(self) -> torch.Tensor:
        """New noise, float32 [b, ...], of each take its own, the same after a resume."""

    @abstractmethod
    def denoise(
        self, number: int, x0: torch.Tensor, noise: torch.Tensor, conditions: Sequence[int] | None = None
    ) -> Denoised:
        """x0 [b, ...], noised to the trained step `number` and denoised. `conditions`: rows whose conditions each is
        denoised under; its own by default."""

    # -- rewards with gradients -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def reward_weights(self) -> dict[str, float]:
        """Of the rewards that `rewards` gives, by name."""

    @abstractmethod
    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        """Samples x0 [b, ...] -> pictures float32 [b, F, 3, H, W] in 0..1, with gradients. Frames that no reward looks
        at may be left black where the VAE decodes frame by frame."""

    @abstractmethod
    def rewards(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures [b, F, 3, H, W] -> float32 [b] of each reward that has gradients, as a reward server would give it,
        not weighted."""
