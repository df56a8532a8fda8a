"""One copy of what is trained: from a group's micro-batches to losses with gradients.

A learner has one replica, or on a CPU several, each in its own thread: they share the weights' memory, not the
gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import Config
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import GroupBatch, Trajectory
from pipeline.generators import adapters
from pipeline.generators.noising import clean_error_scale, noised, target
from pipeline.generators.replay.replayer import Replayer
from pipeline.generators.replay.text_inputs import TextReencoder, reference_inputs
from pipeline.learner.gradient_rewards import GradientRewards
from pipeline.learner.micro_batch import ReplayCall, replay_calls
from pipeline.learner.policy_store import OLD, REFERENCE, PolicyStore, worn
from pipeline.learner.tail import ReplayedTail
from pipeline.learner.trained_model import Modules
from pipeline.rl.group_plan import scoring_seed
from pipeline.rl.objectives import Objective, objective_of
from pipeline.rl.objectives.base import Loss
from pipeline.rl.objectives.micro_batch import Denoised, Drawn, Finished, MicroBatch, Pairs
from pipeline.rl.samplers import Transition


class Replica:
    """`modules`: the denoisers; `trained`: what has trainable weights; `frozen`: copies of the denoisers for the passes
    of other policies (full weights, where the objective requires one; else None), which hold the starting weights;
    `text`: where text encoders are trained; `policies`: the other policies' weights; `rewards`: those with gradients,
    where the objective requires them. All replicas share the last two."""

    def __init__(
        self,
        cfg: Config,
        device: torch.device,
        modules: Modules,
        trained: Modules,
        frozen: Modules | None,
        text: TextReencoder | None = None,
        policies: PolicyStore | None = None,
        rewards: GradientRewards | None = None,
    ) -> None:
        self.cfg, self.device, self.text = cfg, device, text
        self.modules, self.trained, self.frozen = modules, trained, frozen
        self.policies, self.rewards = policies or PolicyStore({}, ()), rewards
        self.parameters = adapters.trainable(trained)
        self.objective = objective_of(cfg)

    def replicate(self) -> Replica:
        """Another replica that shares the weights and has its own gradients."""
        everything = [self.modules, self.trained, self.frozen or {}]
        tensors = [t for modules in everything for m in modules.values() for t in (*m.parameters(), *m.buffers())]
        same: dict[int, Any] = {}
        for tensor in tensors:
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            same[id(tensor)] = torch.nn.Parameter(tensor.data, tensor.requires_grad) if is_parameter else tensor
        modules, trained, frozen = copy.deepcopy((self.modules, self.trained, self.frozen), same)
        return Replica(self.cfg, self.device, modules, trained, frozen, policies=self.policies, rewards=self.rewards)

    def micro_batches(self, trajectory: Trajectory, number: int) -> list[ReplayCall]:
        """Those of one part of a trajectory, on the replica's device."""
        replayer = Replayer(trajectory.parts[number], trajectory.spec, self.modules, self.device)
        check_fit(self.objective, replayer, len(trajectory.parts))
        if self.text is not None:
            self.text.override_text(replayer, trajectory.sampling)
        return replay_calls(self.cfg, replayer)

    def loss(self, group: GroupBatch, call: ReplayCall, check_replay: bool) -> Loss:
        """`check_replay`: the group is one whose replay is compared with its rollout, where that costs an extra
        forward pass."""
        return self.objective.loss(ReplayedMicroBatch(self, group, call, check_replay))

    def autocast(self) -> AbstractContextManager[Any]:
        """Of the denoiser, as configured.

        Several replicas cast without autocast's cache: one that traces a graph holds the cache's lock while it waits
        for the GIL, and another one that leaves autocast holds the GIL while it waits for the lock, for ever.
        """
        return torch.autocast(
            self.device.type,
            dtype=getattr(torch, self.cfg.learner.autocast, None),
            enabled=self.cfg.learner.autocast != "none",
            cache_enabled=self.cfg.learner.replicas == 1,
        )

    def output(self, call: ReplayCall, x: torch.Tensor) -> torch.Tensor:
        """What the scheduler would be given for the sample x [b, ...]."""
        with self.autocast():
            return call.model_output(x)

    def other_output(self, policy: str, call: ReplayCall, x: torch.Tensor) -> torch.Tensor:
        """The output of another policy: the reference, or one of the store. No gradients."""
        with self.as_policy(policy, call.replayer) as replayer:
            return self.output(ReplayCall(replayer, call.step, call.takes), x)

    @contextmanager
    def as_policy(self, policy: str, replayer: Replayer) -> Iterator[Replayer]:
        """The replayer of the same part with another policy's weights, within the block. No gradients."""
        with torch.no_grad():
            if self.frozen is not None:
                parameters = {
                    f"{name}.{key}": p for name, module in self.frozen.items() for key, p in module.named_parameters()
                }
                with worn(parameters, {} if policy == REFERENCE else self.policies[policy]):
                    yield Replayer(replayer.part, replayer.spec, self.frozen, self.device)
            elif policy == REFERENCE:
                with adapters.adapters_off(self.trained), reference_inputs(replayer):
                    yield replayer
            else:
                with worn(self.parameters, self.policies[policy]):
                    yield replayer


class ReplayedMicroBatch(MicroBatch):
    """A replay call of a group, run with a replica's weights."""

    def __init__(self, replica: Replica, group: GroupBatch, call: ReplayCall, check_replay: bool) -> None:
        self._replica, self._group, self._call, self._check_replay = replica, group, call, check_replay

    @property
    def advantages(self) -> torch.Tensor:
        if self._group.feedback.advantages is None:
            raise RuntimeError("the group's feedback has no advantages")
        return self._call.per_take(self._group.feedback.advantages)

    @property
    def pairs(self) -> Pairs:
        feedback, device = self._group.feedback, self._call.replayer.device
        if feedback.pairs is None or feedback.pair_weights is None:
            raise RuntimeError("the group's feedback has no pairs")
        takes = self._call.replayer.plain.total
        repeats = self._call.replayer.total // takes  # joined steps, each with all takes of the group
        pairs = np.concatenate([feedback.pairs + step * takes for step in range(repeats)])
        rows = torch.from_numpy(pairs).to(device)

        def tiled(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.tile(values, repeats)).to(device)

        gaps = None if feedback.pair_gaps is None else tiled(feedback.pair_gaps)
        return Pairs(rows[:, 0], rows[:, 1], tiled(feedback.pair_weights), gaps)

    @property
    def is_stale(self) -> bool:
        return self._group.staleness > 0

    @property
    def only_update(self) -> bool:
        return self._replica.cfg.step.updates == 1

    def levels(self) -> list[tuple[slice, MicroBatch]]:
        start, levels = 0, list[tuple[slice, MicroBatch]]()
        whole = self._replica.objective.requirements.unit == "trajectory"
        for call in self._call.at_every_step() if whole else self._call.levels():
            rows = slice(start, start + call.takes.stop - call.takes.start)
            levels.append((rows, ReplayedMicroBatch(self._replica, self._group, call, self._check_replay)))
            start = 0 if whole else rows.stop
        return levels

    def drawn(self) -> Drawn:
        call = self._call
        x, x_next, log_prob = call.replayer.step_tensors(call.step, call.takes)
        mean = call.replayer.old_mean(call.step, call.takes) if call.recorded.mean is not None else None
        return Drawn(x, x_next, log_prob, mean)

    def transition(self, x: torch.Tensor, output: torch.Tensor) -> Transition:
        return self._call.transition(x, output, self._group.held.sampling)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return self._replica.output(self._call, x)

    def reference_output(self, x: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        call = self._call
        if rows is not None:
            call = call.of_takes(slice(call.takes.start + rows.start, call.takes.start + rows.stop))
        return self._replica.other_output(REFERENCE, call, x)

    def old_output(self, x: torch.Tensor) -> torch.Tensor:
        return self._replica.other_output(OLD, self._call, x)

    def rows_at_every(self, nth: int) -> list[slice]:
        start = self._call.takes.start
        takes = self._call.takes_at_every(nth, self._group.held.group)
        return [slice(each.start - start, each.stop - start) for each in takes]

    def clean(self) -> torch.Tensor:
        return self._call.replayer.clean(self._call.takes).float()

    def fresh_noise(self) -> tuple[torch.Tensor, torch.Tensor]:
        call, x0 = self._call, self.clean()
        steps, repeats = call.joined_steps, call.replayer.plain.total
        sigma = torch.tensor([step.sigma for step in steps], dtype=torch.float64, device=x0.device)
        run_seed, group = self._replica.cfg.run.seed, self._group.held.group
        noise = [matching_noise(run_seed, group, step.index, x0[0]) for step in steps]
        sigma = sigma.repeat_interleave(repeats)[call.takes].reshape(-1, *[1] * (x0.ndim - 1))
        return sigma, torch.stack(noise).repeat_interleave(repeats, 0)[call.takes]

    def noised(self, x0: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        dtype = getattr(torch, self._call.recorded.sample.dtype)
        return noised(self._call.replayer.spec.prediction, sigma, x0, noise).to(dtype)

    def target(self, x0: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return target(self._call.replayer.spec.prediction, sigma, x0, noise)

    def clean_error_scale(self, sigma: torch.Tensor) -> torch.Tensor:
        return clean_error_scale(self._call.replayer.spec.prediction, sigma)

    @torch.no_grad()
    def replay_error(self) -> torch.Tensor | None:
        if not (self._check_replay and self._call.checks_replay):
            return None
        call = self._call.levels()[0]
        x, x_next = call.replayer.samples(call.step, call.takes)
        if self._replica.objective.requirements.old_policy:  # it drew the takes
            output = self._replica.other_output(OLD, call, x)
        else:
            output = self._replica.output(call, x)
        replayed = call.transition(x, output, self._group.held.sampling).mean
        return (replayed.to(x_next.dtype) - x_next).float()

    # -- of a tail ------------------------------------------------------------------------------------------------

    def finish(self, jump: bool = False, detach: bool = False) -> Finished:
        with self._replica.autocast():
            return self._tail(self._call.replayer).finish(jump, detach)

    def reference_finish(self, jump: bool = False) -> torch.Tensor:
        with self._replica.as_policy(REFERENCE, self._call.replayer) as replayer, self._replica.autocast():
            return self._tail(replayer).finish(jump).clean

    def denoise_again(self, x0: torch.Tensor, number: int) -> torch.Tensor:
        with self._replica.autocast():
            return self._tail(self._call.replayer).denoise_again(x0, (self._replica.cfg.run.seed, number))

    @property
    def steps_left(self) -> tuple[int, ...]:
        held = self._group.held
        return tuple(held.sampling.num_steps - step.index for step in self._call.replayer.part.steps)

    def noise_of_takes(self) -> torch.Tensor:
        return self._tail(self._call.replayer).noise_of_takes(self.clean()[0], self._replica.cfg.run.seed)

    def denoise(
        self, number: int, x0: torch.Tensor, noise: torch.Tensor, conditions: Sequence[int] | None = None
    ) -> Denoised:
        with self._replica.autocast():
            return self._tail(self._call.replayer).denoise(number, x0, noise, conditions)

    def _tail(self, replayer: Replayer) -> ReplayedTail:
        return ReplayedTail(self._group.held, replayer, self._call.takes)

    # -- rewards with gradients -----------------------------------------------------------------------------------

    @property
    def reward_weights(self) -> dict[str, float]:
        return self._rewards.weights

    def pixels(self, x0: torch.Tensor) -> torch.Tensor:
        return self._rewards.pixels(x0, self._group.held.spec, self._scoring_seed)

    def rewards(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        part = self._call.replayer.part
        prompts = self._group.prompts[part.start : part.stop][self._call.takes]
        return self._rewards.values(pixels, prompts, self._scoring_seed)

    @property
    def _rewards(self) -> GradientRewards:
        if self._replica.rewards is None:
            raise RuntimeError("the objective does not require reward gradients")
        return self._replica.rewards

    @property
    def _scoring_seed(self) -> int:
        return scoring_seed(self._replica.cfg, self._group.held.group)


def check_fit(objective: Objective, replayer: Replayer, parts: int) -> None:
    """Raises `UnsupportedPolicyError` where the recorded policy cannot do what the objective requires. `parts`: of its
    trajectory."""
    if objective.requirements.whole_group and parts > 1:
        raise UnsupportedPolicyError(
            f"objective.name: {objective.name} compares all takes of a group in one call, and {replayer.spec.pipeline} "
            f"draws them in {parts}; use {'grpo' if objective.requirements.draws_noise else 'awm'}"
        )
    needs = objective.requirements
    if needs.reward_gradient and (why := replayer.spec.why_no_reward_gradient(objective.name, needs.moved_sample)):
        raise UnsupportedPolicyError(why)
    if needs.moved_sample and not all(map(replayer.has_slots, replayer.part.steps)):
        raise UnsupportedPolicyError(f"{replayer.spec.pipeline}: inputs of another shape than was probed")
    if needs.any_sample and not all(map(replayer.takes_any_sample, range(len(replayer.part.steps)))):
        why = replayer.spec.why_not_noised_again(objective.name)
        raise UnsupportedPolicyError(why or f"{replayer.spec.pipeline}: inputs of another shape than was probed")


def matching_noise(run_seed: int, group: int, index: int, like: torch.Tensor) -> torch.Tensor:
    """The noise for the finished takes of `group` at sampler step `index`: float32, shaped like one take, the same
    after a resume. All takes of a group share it: what they have in common cancels, since advantages sum to zero."""
    seed = int(np.random.SeedSequence([run_seed, group, index, 0xA3]).generate_state(1)[0])
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)
