"""The learner: replays trajectories with gradients and takes optimiser steps. Plain torch, no Ray.

One optimisation step is `step.updates` optimiser updates, each over whole groups, which replicas
(`pipeline.learner.replica`) replay micro-batch by micro-batch. With several ranks (`pipeline.learner.distributed`) each
rank replays the micro-batches assigned to it, and all ranks make every call together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import Config
from pipeline.core.devices import resolve_device
from pipeline.core.errors import CheckpointError, RunFailed, UnsupportedPolicyError
from pipeline.core.types import GroupBatch, MicroBatchSpec, WeightSet
from pipeline.generators import adapters
from pipeline.generators.load.compiling import compile_blocks
from pipeline.learner.accumulator import GradientAccumulator, RowLayout, UpdateStatistics, count_pairs
from pipeline.learner.distributed import DistributedContext, copy_into, full_tensor, shard_like
from pipeline.learner.gradient_rewards import GradientRewards
from pipeline.learner.micro_batch import ReplayCall, micro_batch_specs
from pipeline.learner.policy_store import EMA, OLD, START, PolicyStore
from pipeline.learner.replica import Replica
from pipeline.learner.trained_model import load_trained_model, only_denoisers
from pipeline.rl.objectives import objective_of


@dataclass(frozen=True, slots=True)
class _GroupTask:
    """A group that one replica replays."""

    position: int  # in the update
    group: GroupBatch
    check_replay: bool


@dataclass(frozen=True, slots=True)
class _PlannedMicroBatch:
    """A micro-batch of a wave of groups, as all ranks see it."""

    group: int  # position in the wave
    spec: MicroBatchSpec
    check_replay: bool

    @property
    def kind(self) -> Hashable:
        """Equal for micro-batches that call the same modules equally often."""
        return self.spec.modules, self.check_replay


class Learner:
    """Holds the denoisers (and text encoders, where these are trained), the optimiser and the EMA. `version` counts
    finished optimisation steps."""

    def __init__(self, cfg: Config, device: str = "auto", distributed: DistributedContext | None = None) -> None:
        self.cfg = cfg
        self.device = resolve_device(device)
        self.distributed = distributed or DistributedContext()
        self.objective = objective_of(cfg)
        self.version = 0
        self.updates = 0  # optimiser updates
        self._layout = RowLayout.of(self.objective, cfg.gradient_rewards)
        self._update = GradientAccumulator(self._layout, 0, 1, frozenset())
        if cfg.learner.replicas > 1 and self.device.type != "cpu":
            raise UnsupportedPolicyError(
                f"learner.replicas: {cfg.learner.replicas} replicas are threads of a CPU, and the learner is on "
                f"{self.device}; set learner.replicas=1 (learner.micro_batch makes larger calls, learner.ranks uses "
                "several GPUs)"
            )
        model = load_trained_model(cfg, self.device, self.distributed)
        self.modules, self.trained, self._rollout_dtype = model.modules, model.trained, model.rollout_dtype
        self.parameters = adapters.trainable(self.trained)
        needs = self.objective.requirements
        kept = {EMA: cfg.optimizer.ema_decay > 0, OLD: needs.old_policy, START: needs.pull_to_start > 0}
        self.policies = PolicyStore(self.parameters, [name for name, needed in kept.items() if needed])
        rewards = GradientRewards(cfg, self.device) if needs.reward_gradient else None
        self.replicas = [
            Replica(cfg, self.device, model.modules, model.trained, model.frozen, model.text, self.policies, rewards)
        ]
        self.replicas += [self.replicas[0].replicate() for _ in range(cfg.learner.replicas - 1)]
        if cfg.generator.compile:
            for replica in self.replicas[1:]:  # a copy of a compiled module is not compiled
                for modules in (replica.modules, replica.frozen or {}):
                    compile_blocks(only_denoisers(modules), self.device)
        self._threads = ThreadPoolExecutor(max(1, len(self.replicas) - 1), "replica")
        opt = cfg.optimizer
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=opt.lr,
            betas=(opt.betas[0], opt.betas[1]),
            eps=opt.eps,
            weight_decay=opt.weight_decay,
        )

    # ------------------------------------------------------------------------------------------- one step

    def train_step(self, batch: list[GroupBatch], first: int = 0, last: bool = True) -> dict[str, float]:
        """Trains on the groups of one step, in the order given; returns metrics and raises `version` by one.

        The groups may come in chunks, unless a step has several updates: `first` is the position in the step of the
        batch's first group, `last` whether the step ends with this batch. Until then gradients are accumulated and
        nothing is returned; `first` 0 discards what was accumulated before. In chunks or at once, the result is the
        same bit for bit where a chunk is a multiple of `groups_at_once`.
        Raises RunFailed when a gradient or the loss is not finite (the weights are left as they were).
        """
        values: dict[str, list[float]] = defaultdict(list)  # metric -> its value in each update
        spreads: dict[str, list[np.ndarray]] = defaultdict(list)  # name -> its values in each update
        replay_error: float | None = None
        for number, chunk in enumerate(np.array_split(np.arange(len(batch)), self.cfg.step.updates)):
            groups = [batch[i] for i in chunk]
            if first == 0:
                self._begin_update(groups, last)
            if self._update.done != first:
                raise RuntimeError(f"group {first} of the step was given, expected was {self._update.done}")
            for wave in self._waves(len(groups)):
                self._accumulate([groups[i] for i in wave])
            if last:
                statistics, metrics = self._finish_update()
                for name, value in metrics.items():
                    values[name].append(value)
                for name, pairs in statistics.spreads.items():
                    spreads[name].append(pairs)
                if number == 0:  # later updates are off-policy
                    replay_error = statistics.replay_error
        if not last:
            return {}
        if OLD in self.policies:
            self.policies.follow(OLD, self.parameters, self.objective.old_decay(self.version))
        self.version += 1
        metric = self.objective.requirements.replay_metric
        if self._update.stale:
            metric = metric.replace("onpolicy/", "offpolicy/")
        return {
            **{name: float(np.mean(entries)) for name, entries in values.items()},
            **self.objective.summarise({name: np.concatenate(entries) for name, entries in spreads.items()}),
            **({metric: replay_error} if replay_error is not None else {}),
        }

    @property
    def groups_at_once(self) -> int:
        """How many groups are replayed at the same time."""
        return self.distributed.data_parallel * len(self.replicas)

    def groups_to_read(self, batch: list[GroupBatch], first: int = 0, last: bool = True) -> set[int]:
        """The positions in `batch` of the groups of which this rank replays micro-batches in `train_step`, known from
        their specs: of the others it needs no trajectory."""
        if self.distributed.world == 1:
            return set(range(len(batch)))
        positions: set[int] = set()
        for chunk in np.array_split(np.arange(len(batch)), self.cfg.step.updates):
            checked = self._checked_groups(self._groups_of_update(len(chunk), last))
            for wave in self._waves(len(chunk)):
                planned = self._plan([batch[chunk[i]] for i in wave], [first + i in checked for i in wave])
                assigned = self.distributed.assign_micro_batches([micro.kind for micro in planned])
                positions |= {int(chunk[wave[planned[each.index].group]]) for each in assigned}
        return positions

    def _waves(self, groups: int) -> list[range]:
        """Which of an update's next groups are replayed together. Replicas: all. Ranks: `groups_at_once`."""
        size = self.groups_at_once if self.distributed.world > 1 else groups
        return [range(start, min(start + size, groups)) for start in range(0, groups, size)]

    def _groups_of_update(self, given: int, last: bool) -> int:
        """Groups of an update whose first `given` ones are there."""
        return given if last else self.cfg.step.groups

    def _checked_groups(self, total: int) -> frozenset[int]:
        """Positions of the groups of an update whose replay is compared with the rollout at the cost of a forward
        pass: as many as are computed at the same time, so that no rank waits for another's check."""
        count = self.distributed.data_parallel
        return frozenset((self.version * count + i) % total for i in range(count))

    def _begin_update(self, groups: list[GroupBatch], last: bool) -> None:
        """A new update, of which `groups` are the first, and all if `last`."""
        total = self._groups_of_update(len(groups), last)
        divisor = count_pairs(groups, self.objective.requirements.unit) * total // len(groups)
        self._update = GradientAccumulator(self._layout, total, divisor=divisor, checked=self._checked_groups(total))
        for replica in self.replicas:
            for parameter in adapters.trainable(replica.trained).values():
                parameter.grad = None

    def _accumulate(self, groups: list[GroupBatch]) -> None:
        """Adds the gradients of the update's next groups, of the loss averaged over all (take, trained step) pairs."""
        update = self._update
        checks = [update.done + i in update.checked for i in range(len(groups))]
        if self.distributed.world == 1:
            tasks = [
                _GroupTask(update.done + i, group, check)
                for i, (group, check) in enumerate(zip(groups, checks, strict=True))
            ]
            shares = [tasks[i :: len(self.replicas)] for i in range(len(self.replicas))]
            others = [
                self._threads.submit(self._replay_groups, replica, share)
                for replica, share in zip(self.replicas[1:], shares[1:], strict=True)
            ]
            update.rows |= self._replay_groups(self.replicas[0], shares[0])
            for other in others:
                update.rows |= other.result()
        else:
            self._replay_assigned(groups, checks)
        update.done += len(groups)
        update.pairs += count_pairs(groups, self.objective.requirements.unit)
        update.stale |= any(group.staleness for group in groups)

    def _replay_groups(self, replica: Replica, tasks: Sequence[_GroupTask]) -> dict[tuple[int, int], np.ndarray]:
        """One replica's groups. Returns the micro-batches' rows by (position of the group, number in the group)."""
        rows: dict[tuple[int, int], np.ndarray] = {}
        for task in tasks:
            number = 0
            for part in range(len(task.group.held.parts)):
                micros = replica.micro_batches(task.group.held, part)
                for micro in micros:
                    rows[task.position, number] = self._backward(replica, task.group, micro, task.check_replay, 1.0)
                    number += 1
                if (reencoded := micros[0].replayer.reencoded) is not None:
                    reencoded.backward()  # through the text encoders once, with the gradients of all micro-batches
        return rows

    def _replay_assigned(self, groups: list[GroupBatch], checks: list[bool]) -> None:
        """The micro-batches of the groups that are assigned to this rank."""
        update, replica = self._update, self.replicas[0]
        planned = self._plan(groups, checks)
        before = len(update.row_sizes)
        loaded: tuple[int, int] | None = None  # group and part of `micros`
        micros: list[ReplayCall] = []
        for assigned in self.distributed.assign_micro_batches([micro.kind for micro in planned]):
            plan = planned[assigned.index]
            group = groups[plan.group]
            if loaded != (plan.group, plan.spec.part):
                micros, loaded = replica.micro_batches(group.held, plan.spec.part), (plan.group, plan.spec.part)
            scale = self.distributed.loss_scale(assigned.counts)
            row = self._backward(replica, group, micros[plan.spec.position], checks[plan.group], scale)
            if assigned.counts and self.distributed.is_reporter:
                update.rows[before + assigned.index] = row
        update.row_sizes += [self._layout.size(plan.spec.takes) for plan in planned]

    def _backward(
        self, replica: Replica, group: GroupBatch, call: ReplayCall, check_replay: bool, scale: float
    ) -> np.ndarray:
        """Adds the gradients of a micro-batch, times `scale`. Returns its row, see `RowLayout`."""
        loss = replica.loss(group, call, check_replay)
        (loss.total.sum() / self._update.divisor * scale).backward()
        return self._layout.row(loss)

    def _finish_update(self) -> tuple[UpdateStatistics, dict[str, float]]:
        """The optimiser's step, once all groups of the update have been replayed. Returns its metrics too."""
        update = self._update
        if update.done != update.groups:
            raise RuntimeError(f"the update has {update.done} of its {update.groups} groups")
        self._sum_replica_gradients()
        statistics = update.statistics(self.distributed)
        loss = sum(weight * statistics.means[name] for name, weight in self.objective.terms.items())
        if update.correction != 1.0:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad *= update.correction
        parameters = list(self.parameters.values())
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, self.cfg.optimizer.max_grad_norm))
        if not (np.isfinite(loss) and bool(torch.isfinite(norm))):
            self.optimizer.zero_grad(set_to_none=True)
            raise RunFailed(
                f"learner: loss {loss:.3g}, gradient norm {float(norm):.3g} at step {self.version}; "
                "lower optimizer.lr, or train fewer low-noise steps (sampler.window.range)"
            )
        lr = self._learning_rate()
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr
        self.optimizer.step()
        self._pull_to_start(lr)
        self.updates += 1
        self._update_ema()
        return statistics, {
            "loss": loss,
            **statistics.means,
            "grad_norm": float(norm),
            "lr": lr,
        }

    def _sum_replica_gradients(self) -> None:
        """Adds the other replicas' gradients to the first one's, in order."""
        for replica in self.replicas[1:]:
            for name, parameter in adapters.trainable(replica.trained).items():
                total, grad = self.parameters[name], parameter.grad
                if grad is not None:
                    total.grad = grad if total.grad is None else total.grad.add_(grad)
                parameter.grad = None

    def _plan(self, groups: list[GroupBatch], checks: list[bool]) -> list[_PlannedMicroBatch]:
        """All micro-batches of the groups, the same on every rank."""
        return [
            _PlannedMicroBatch(position, spec, spec.extra_replay_check and checks[position])
            for position, group in enumerate(groups)
            for spec in group.micro_batches or micro_batch_specs(self.cfg, group.held)
        ]

    def _learning_rate(self) -> float:
        warmup = self.cfg.optimizer.warmup_steps
        return self.cfg.optimizer.lr * (min(1.0, (self.updates + 1) / warmup) if warmup else 1.0)

    @torch.no_grad()
    def _pull_to_start(self, lr: float) -> None:
        """Like AdamW's weight decay, towards the weights that the run started from instead of 0."""
        if START in self.policies:
            share = min(1.0, lr * self.objective.requirements.pull_to_start)
            for name, parameter in self.parameters.items():
                parameter.lerp_(self.policies[START][name], share)

    def _update_ema(self) -> None:
        if EMA not in self.policies:
            return
        # Ramped up, so that short runs are not held back by the starting weights.
        decay = min(self.cfg.optimizer.ema_decay, (1.0 + self.updates) / (10.0 + self.updates))
        self.policies.follow(EMA, self.parameters, decay)

    # ------------------------------------------------------------------------------------------- weights and state

    def weights(self, tag: str = "train") -> WeightSet:
        """The trained weights, or those of a policy in the store (`ema` without an EMA: the trained ones), in the dtype
        that rollouts use.

        All ranks must call it; rank 0 gets the weights, the others an empty set. The same goes for `state`.
        """
        source = self.policies[tag] if tag in self.policies else self.parameters
        kind = self.cfg.trainable.kind
        return adapters.to_weight_set(kind, self._gathered({n: t.to(self._rollout_dtype) for n, t in source.items()}))

    def _gathered(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Unsharded, on rank 0; in CPU memory where they were sharded."""
        gathered = {}
        for name, tensor in tensors.items():
            value = full_tensor(tensor.detach())
            if self.distributed.is_main:
                gathered[name] = value if self.distributed.world == 1 else value.cpu()
        return gathered

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything needed to resume: weights, EMA, optimiser moments; version and update counters."""
        tensors: dict[str, torch.Tensor] = {f"weights/{n}": p for n, p in self.parameters.items()}
        tensors |= self.policies.tensors()
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        copies = {name: tensor.cpu().clone() for name, tensor in self._gathered(tensors).items()}
        return copies, {"version": self.version, "updates": self.updates}

    def load_state(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Restores `state()`. Raises CheckpointError naming the first tensor that is missing or unexpected."""
        expected = {f"weights/{n}" for n in self.parameters} | set(self.policies.tensors())
        stored = {n for n in tensors if not n.startswith("optimizer/")}
        if expected != stored:
            differing = sorted(expected ^ stored)
            raise CheckpointError(
                f"checkpoint does not fit this config: {len(differing)} tensors differ, such as {differing[0]}"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                copy_into(parameter, tensors[f"weights/{name}"])
        self.policies.load(tensors)
        for name, parameter in self.parameters.items():
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                moment = tensors.get(f"optimizer/{key}/{name}")
                if moment is not None:
                    state[key] = moment.clone() if key == "step" else shard_like(moment, parameter.detach())
            if state:
                self.optimizer.state[parameter] = state
        self.version, self.updates = int(meta["version"]), int(meta["updates"])
