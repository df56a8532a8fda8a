"""The denoising chain of a whole group in the learner: its recorded noise levels, callable for any takes and samples.

A group may have been drawn in several pipeline calls, the parts of its trajectory. The chain hides them: takes are
positions in the group, and levels are positions among the recorded sampler steps. It calls no pipeline: the denoisers
get the recorded inputs, with the sample's values put where probing has found them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from pipeline.core.tensors import PackedTensor, unpack
from pipeline.core.types import RecordedStep, Trajectory
from pipeline.generators import noising
from pipeline.generators.replay.call_inputs import CannotJoin, StepRows, run_calls
from pipeline.generators.replay.replayer import Replayer, replayed_transition
from pipeline.generators.spec import Takes
from pipeline.rl.samplers import NoiseLevels, Transition

TakeIndex = Sequence[int] | np.ndarray | slice  # positions in the group, in any order, repeated or not
LevelIndex = int | Sequence[int]  # position of a level; or of one per row
Noise = Callable[[int, torch.Tensor], torch.Tensor]  # (level, x_t [b, ...]) -> standard normal noise, like x_t


@dataclass(frozen=True, slots=True)
class Level:
    """A recorded sampler step."""

    index: int  # sampler step, 0 = noisiest
    noise: NoiseLevels  # where the step begins and ends
    stochastic: bool  # the rollout drew noise here
    last: bool  # the sampler's last step, which ends at x0


@dataclass(frozen=True, slots=True)
class DrawnStep:
    """What the rollout drew at a level, for b takes."""

    x: torch.Tensor  # [b, ...] x_t
    x_next: torch.Tensor  # [b, ...], rounded as its log-prob was taken
    log_prob: torch.Tensor | None  # float32 [b]; None where no noise was drawn
    mean: torch.Tensor | None  # float32 [b, ...]; None unless the recorder kept it


class DenoisingChain:
    """See the module docstring. `parts`: a replayer per trajectory part; made here unless given, with text inputs that
    were computed again, say."""

    def __init__(
        self,
        trajectory: Trajectory,
        modules: dict[str, torch.nn.Module],
        device: torch.device,
        parts: Sequence[Replayer] | None = None,
    ) -> None:
        """Raises ValueError where the parts recorded different steps."""
        self.spec, self.sampling, self.modules, self.device = trajectory.spec, trajectory.sampling, modules, device
        made = parts or [Replayer(part, trajectory.spec, modules, device) for part in trajectory.parts]
        self.parts = sorted(made, key=lambda part: part.part.start)
        self.takes = sum(part.total for part in self.parts)
        grids = [[(s.index, s.sigma, s.sigma_next, s.sigma_cap) for s in part.part.steps] for part in self.parts]
        if any(grid != grids[0] for grid in grids):
            raise ValueError(f"group {trajectory.group}: its parts recorded different sampler steps")
        self.levels = tuple(
            Level(
                index=index,
                noise=NoiseLevels(*noise),
                stochastic=index in self.sampling.stochastic_steps,
                last=index == self.sampling.num_steps - 1,
            )
            for index, *noise in grids[0]
        )
        self._homes = [(number, take) for number, part in enumerate(self.parts) for take in range(part.total)]

    def with_modules(self, modules: dict[str, torch.nn.Module]) -> DenoisingChain:
        """The same chain with other denoisers: a frozen reference."""
        chain = object.__new__(DenoisingChain)
        chain.__dict__.update({**self.__dict__, "modules": modules})
        return chain

    @property
    def why_not_any_sample(self) -> str:
        """Why `output` must be given recorded states alone; "": it takes any sample."""
        if self.spec.sample_note:
            return str(self.spec.sample_note)
        fits = all(part.has_slots(step) for part in self.parts for step in part.part.steps)
        return "" if fits else "the denoiser's inputs have other shapes than when the pipeline was probed"

    # -- what the rollout left ------------------------------------------------------------------------------------

    def state(self, j: LevelIndex, takes: TakeIndex) -> torch.Tensor:
        """The recorded x_t [b, ...]. Raises RuntimeError where only conditions were recorded."""
        if not all(part.part.drawn for part in self.parts):
            raise RuntimeError("this group was not drawn: only its conditions were recorded")
        return self._gather(j, takes, lambda step: unpack(step.sample, self.device))

    def drawn(self, j: LevelIndex, takes: TakeIndex) -> DrawnStep:
        """What was drawn at a level (or at one per row)."""
        steps = [part.part.steps[level] for part in self.parts for level in {*self._level_list(j, 1)}]
        noisy = all(step.log_prob is not None for step in steps)
        kept = all(step.mean is not None for step in steps)
        return DrawnStep(
            x=self.state(j, takes),
            x_next=self._gather(j, takes, lambda step: unpack(step.next_sample, self.device)),
            log_prob=self._gather(j, takes, lambda step: self._array(step.log_prob)) if noisy else None,
            mean=self._gather(j, takes, lambda step: self._array(step.mean)) if kept else None,
        )

    def drawn_noise(self, j: int, takes: TakeIndex) -> torch.Tensor:
        """The standard normal noise of the rollout's step [b, ...], float32, from the mean that was kept, else from the
        replayed one (which has to be on-policy). Raises ValueError at a level that drew none."""
        drawn = self.drawn(j, takes)
        with torch.no_grad():
            step = self.move(j, drawn.x, self.output(j, drawn.x, takes), takes)
        if step.std == 0.0:
            raise ValueError(f"sampler step {self.levels[j].index} drew no noise")
        return (drawn.x_next.float() - (step.mean if drawn.mean is None else drawn.mean)) / step.std

    def clean(self, takes: TakeIndex) -> torch.Tensor:
        """The finished latents x0 [b, ...]. Raises RuntimeError where there are none."""
        if any(part.part.final is None for part in self.parts):
            raise RuntimeError("this group has no finished latents: only its conditions were recorded")
        rows = [unpack(part.part.final, self.device) for part in self.parts]
        return torch.cat(rows)[self._take_list(takes)]

    def chosen(self, j: int, takes: TakeIndex) -> torch.Tensor | None:
        """Bool [b, ...]: the values of the sample that the policy chooses, where the pipeline puts its own in the place
        of others after each step; None: all of them. The last step's are those of the step before."""
        masks = []
        for part in self.parts:
            steps = part.part.steps[: j + 1]
            mask: PackedTensor | None = steps[-1].mask
            if mask is None and self.levels[j].last and len(steps) > 1:
                mask = steps[-2].mask
            shape = steps[-1].sample.data.shape
            masks.append(torch.ones(shape, dtype=torch.bool) if mask is None else unpack(mask))
        if all(bool(mask.all()) for mask in masks):
            return None
        return torch.cat(masks)[self._take_list(takes)].to(self.device)

    # -- the policy -----------------------------------------------------------------------------------------------

    def output(
        self, j: LevelIndex, x: torch.Tensor, takes: TakeIndex, prompts: TakeIndex | None = None
    ) -> torch.Tensor:
        """What the scheduler is given for samples x [b, ...] of `takes`, with guidance; gradients as grad mode says.

        `j`: a level, or one per row. `prompts`: takes whose conditions the rows get, their own by default. One denoiser
        call for all rows where their conditions can be laid side by side, else one for each part and level. Samples
        other than the recorded states need `why_not_any_sample` to be "".
        """
        levels = self._level_list(j, x.shape[0])
        owners = self._take_list(takes if prompts is None else prompts)
        if len(owners) != x.shape[0]:
            raise ValueError(f"{x.shape[0]} samples for {len(owners)} takes")
        x = x.to(getattr(torch, self._step(0).sample.dtype))
        if self.spec.layouts is None:
            return self._whole_parts(levels, x, owners)
        rows: dict[tuple[int, int], list[int]] = {}  # (part, level) -> rows
        for row, (level, owner) in enumerate(zip(levels, owners, strict=True)):
            rows.setdefault((self._homes[owner][0], level), []).append(row)
        sources = []
        for (number, level), places in rows.items():
            part = self.parts[number]
            positions = [self._homes[owners[row]][1] for row in places]
            sources.append(StepRows(part, part.part.steps[level], _takes(positions, part.total)))
        flat = [row for places in rows.values() for row in places]
        order = np.argsort(flat).tolist()
        try:
            return run_calls(sources, x, self.spec, self.modules, order)
        except CannotJoin:
            if len(sources) == 1:
                raise
        outputs = [
            run_calls([source], x[places], self.spec, self.modules)
            for source, places in zip(sources, rows.values(), strict=True)
        ]
        return torch.cat(outputs)[order]

    def move(self, j: int, x: torch.Tensor, out: torch.Tensor, takes: TakeIndex | None = None) -> Transition:
        """The Gaussian of the step from x [b, ...] for a model output. `takes`: restrict it to the values that the
        policy chose of them."""
        step = replayed_transition(self.spec, self.sampling, self._step(j), x, out)
        mask = None
        if takes is not None and any(part.part.steps[j].mask is not None for part in self.parts):
            mask = self.chosen(j, takes)
        return replace(step, mask=mask)

    def run(
        self,
        x: torch.Tensor,
        takes: TakeIndex,
        start: int,
        stop: int,
        noise: Noise | None = None,
        jump: bool = False,
        detach: bool = False,
        reached: Callable[[int, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Steps [start, stop) of the chain from x [b, ...] at level `start`; with gradients, each denoiser call is
        computed again in the backward pass.

        `noise`: of the steps that draw some; None: they take their mean. `jump`: the last step goes to its x0
        prediction. `detach`: gradients do not go through the denoiser's input (DRTune, arXiv 2405.00760), only along
        the samples. `reached`: sees each level and the sample that the sampler's step goes to from there, also where
        the chain jumps. Raises ValueError where the levels are not consecutive steps of the sampler, or an LCM's own
        noise is missing.
        """
        for j in range(start, stop):
            if j > start and self.levels[j].index != self.levels[j - 1].index + 1:
                raise ValueError(f"sampler step {self.levels[j - 1].index + 1} was not recorded")
            out = self._output_checkpointed(j, x.detach() if detach else x, takes)
            jumps = jump and j == stop - 1
            step = self.move(j, x, out)
            x_next = step.mean
            if step.std > 0.0 and noise is not None:
                x_next = x_next + step.std * noise(j, x)
            elif step.std > 0.0 and self.spec.consistency and not jumps:
                raise ValueError("a consistency sampler needs noise at every step but the last")
            x_next = x_next.to(x.dtype)
            if reached is not None:
                reached(j, x_next.detach())
            x = self.clean_of(j, x, out).to(x.dtype) if jumps else self.pinned(j + 1, x_next, takes)
        return x

    def _output_checkpointed(self, j: int, x: torch.Tensor, takes: TakeIndex) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.output(j, x, takes)
        out = checkpoint(self.output, j, x, takes, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(out, torch.Tensor)
        return out

    def pinned(self, j: int, x: torch.Tensor, takes: TakeIndex) -> torch.Tensor:
        """x [b, ...] at level `j` with the values that the pipeline itself puts into it; as it is after the last
        recorded level."""
        if not 0 < j < len(self.levels) or (mask := self.chosen(j - 1, takes)) is None:
            return x
        return torch.where(mask, x, self.state(j, takes).to(x.dtype))

    # -- noise levels ---------------------------------------------------------------------------------------------

    def clean_of(self, j: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x0 as a model output predicts it at level `j`, float32 [b, ...]."""
        return noising.clean_prediction(self.spec.prediction, self.levels[j].noise, x, out, self.spec.consistency)

    def noised(self, j: LevelIndex, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """x0 [b, ...] noised to level `j`, in the recorded samples' dtype. `eps`: float32, broadcast to x0."""
        x = noising.noised(self.spec.prediction, self._sigma(j, x0), x0, eps)
        return x.to(getattr(torch, self._step(0).sample.dtype))

    def target(self, j: LevelIndex, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """The output of a perfect model for `noised(j, x0, eps)`, float32 [b, ...]."""
        return noising.target(self.spec.prediction, self._sigma(j, x0), x0, eps)

    def _sigma(self, j: LevelIndex, x0: torch.Tensor) -> torch.Tensor:
        """Float64 [b, 1, ...]."""
        levels = [self.levels[level].noise.sigma for level in self._level_list(j, x0.shape[0])]
        return torch.tensor(levels, dtype=torch.float64, device=x0.device).reshape(-1, *[1] * (x0.ndim - 1))

    # -- indices --------------------------------------------------------------------------------------------------

    def _take_list(self, takes: TakeIndex) -> list[int]:
        chosen: list[int] = np.arange(self.takes)[
            takes if isinstance(takes, slice) else np.asarray(takes, int)
        ].tolist()
        return chosen

    @staticmethod
    def _level_list(j: LevelIndex, rows: int) -> list[int]:
        return [j] * rows if isinstance(j, (int, np.integer)) else list(j)

    def _step(self, j: int) -> RecordedStep:
        return self.parts[0].part.steps[j]

    def _array(self, array: np.ndarray | None) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)

    def _gather(self, j: LevelIndex, takes: TakeIndex, value: Callable[[RecordedStep], torch.Tensor]) -> torch.Tensor:
        """A recorded value of the takes [b, ...], at a level or at one per row."""
        chosen = self._take_list(takes)
        levels = self._level_list(j, len(chosen))
        of_level = {
            level: torch.cat([value(part.part.steps[level]) for part in self.parts]) for level in dict.fromkeys(levels)
        }
        if len(of_level) == 1:
            return of_level[levels[0]][chosen]
        return torch.stack([of_level[level][take] for level, take in zip(levels, chosen, strict=True)])

    def _whole_parts(self, levels: list[int], x: torch.Tensor, owners: list[int]) -> torch.Tensor:
        """As `output`, where inputs cannot be split by take: whole parts are run, row by row in their takes' places."""
        outputs: list[torch.Tensor | None] = [None] * len(owners)
        while any(done is None for done in outputs):
            waiting = [row for row, done in enumerate(outputs) if done is None]
            number, level = self._homes[owners[waiting[0]]][0], levels[waiting[0]]
            part = self.parts[number]
            sample = list(unpack(part.part.steps[level].sample, self.device).unbind(0))
            placed: dict[int, int] = {}  # take of the part -> row
            for row in waiting:
                home, take = self._homes[owners[row]]
                if home == number and levels[row] == level and take not in placed:
                    placed[take] = row
                    sample[take] = x[row]
            rows = [StepRows(part, part.part.steps[level], None)]
            out = run_calls(rows, torch.stack(sample), self.spec, self.modules)
            for take, row in placed.items():
                outputs[row] = out[take]
        return torch.stack([out for out in outputs if out is not None])


def _takes(positions: list[int], total: int) -> Takes | None:
    """Positions in a part, as a slice where they follow one another; None: all, in order."""
    if positions == list(range(total)):
        return None
    start, stop = positions[0], positions[-1] + 1
    return slice(start, stop) if positions == list(range(start, stop)) else positions
