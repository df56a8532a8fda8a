"""The GRPO learner: replays trajectories with gradients on, and takes optimiser steps. Plain torch, no Ray.

One optimisation step = `updates_per_step` optimiser updates, each over whole groups, which lanes
(`pipeline.learner.replica`) replay micro-batch by micro-batch. With several ranks (`pipeline.learner.distributed`)
each replays its share of the micro-batches, and every call belongs to all ranks together.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch

from pipeline.config.schema import Config
from pipeline.core.errors import CheckpointError, RunFailed, UnsupportedPolicyError
from pipeline.core.types import GroupBatch, WeightSet
from pipeline.generators import adapters
from pipeline.generators.load.compiling import compile_blocks
from pipeline.generators.load.pipeline import (
    denoisers_of,
    load_denoisers,
    load_pipeline,
    resolve_device,
    resolve_dtype,
    trained_modules,
)
from pipeline.generators.replay.text_inputs import TextReencoder
from pipeline.learner.accumulator import LOGGED, GradientAccumulator, pairs_of
from pipeline.learner.distributed import DistributedContext, copy_into, full_tensor, shard_like
from pipeline.learner.replica import MicroBatch, Replica, micro_batch_specs


class Learner:
    """Holds the denoisers (and text encoders, where these are trained), the optimiser and the EMA. `version` counts
    finished optimisation steps."""

    def __init__(self, cfg: Config, device: str = "auto", ranks: DistributedContext | None = None) -> None:
        self.cfg = cfg
        self.device = resolve_device(device)
        self.distributed = ranks or DistributedContext()
        self.version = 0
        self.updates = 0
        self._update = GradientAccumulator(0, 1, frozenset())
        wire = resolve_dtype(cfg.generator.dtype, self.device)
        full = cfg.trainable.kind == "full"
        # Full weights are mastered in float32; under a LoRA the frozen base may stay in the sampling dtype.
        base = torch.float32 if full or cfg.learner.autocast != "none" else wire
        if cfg.generator.quantize != "none":
            base = wire  # rounded from the same weights as the rollouts'
        self._wire_dtype = wire if full else torch.float32
        text: TextReencoder | None = None
        if cfg.trainable.modules == "denoiser":
            # Shards go to the device block by block: the whole model need not fit there.
            at_first = self.device if self.distributed.world == 1 else torch.device("cpu")
            self.modules = self.trained = load_denoisers(cfg.generator, at_first, base)
        else:
            pipe = load_pipeline(cfg.generator, self.device)
            self.modules = denoisers_of(pipe)
            if base != wire:
                for module in self.modules.values():
                    module.to(base)
            self.trained = trained_modules(pipe, cfg.trainable)
            text = TextReencoder(pipe, cfg.generator)
        needs_reference = cfg.algorithm.kl_beta > 0
        reference = copy.deepcopy(self.modules) if full and needs_reference else None
        adapters.add_adapters(self.trained, cfg.trainable, cfg.run.seed)
        if cfg.learner.activation_checkpointing:
            for module in self.modules.values():
                module.enable_gradient_checkpointing()  # type: ignore[operator]
                module.train()  # diffusers recomputes activations only in train mode; see _no_dropout
                _no_dropout(module)
        if cfg.generator.compile:
            for modules in (self.modules, reference or {}):
                compile_blocks(modules, self.device)
        for modules in (self.modules, reference or {}):
            self.distributed.split_context(modules)
            self.distributed.shard(modules)
        if cfg.learner.replicas > 1 and self.device.type != "cpu":
            raise UnsupportedPolicyError(
                f"learner.replicas: {cfg.learner.replicas} replicas are threads of a CPU, and the learner is on "
                f"{self.device}; set learner.replicas=1 (learner.micro_batch makes larger calls, learner.ranks uses "
                "several GPUs)"
            )
        self.replicas = [Replica(cfg, self.device, self.modules, self.trained, reference, text)]
        self.replicas += [self.replicas[0].replicate() for _ in range(cfg.learner.replicas - 1)]
        if cfg.generator.compile:
            for lane in self.replicas[1:]:  # a copy of a compiled module is not compiled
                for modules in (lane.modules, lane.reference or {}):
                    compile_blocks(modules, self.device)
        self._threads = ThreadPoolExecutor(max(1, len(self.replicas) - 1), "lane")
        self.parameters = adapters.trainable(self.trained)
        opt = cfg.optimizer
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=opt.lr,
            betas=(opt.betas[0], opt.betas[1]),
            eps=opt.eps,
            weight_decay=opt.weight_decay,
        )
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if opt.ema_decay > 0 else {}

    # -- one optimisation step ------------------------------------------------------------------------------------

    def train_step(self, batch: list[GroupBatch], first: int = 0, last: bool = True) -> dict[str, float]:
        """Trains on the groups of one step, in the order given; returns metrics and raises `version` by one.

        The groups may come in portions, unless a step has several updates: `first` is the place of the batch's first
        group in the step, `last` whether the step ends with it. Until then gradients are added up and nothing is
        returned; with `first` 0 they are begun anew. In portions or at once, the result is the same bit for bit where a
        portion is a multiple of `apart` groups.
        Raises RunFailed when a gradient or the loss is not finite (the weights are left as they were).
        """
        stats: dict[str, list[Any]] = defaultdict(list)
        algorithm = self.cfg.algorithm
        for number, chunk in enumerate(np.array_split(np.arange(len(batch)), algorithm.updates_per_step)):
            groups = [batch[i] for i in chunk]
            if first == 0:
                self._begin(groups, last)
            if self._update.done != first:
                raise RuntimeError(f"group {first} of the step was given, expected was {self._update.done}")
            for at_once in self._at_once(len(groups)):
                self._replay([groups[i] for i in at_once])
            if last:
                self._finish(stats, first=number == 0)
        if not last:
            return {}
        self.version += 1
        ratios = np.concatenate(stats.pop("ratio_values"))
        on_policy = stats.pop("on_policy_gap")
        metrics = {name: float(np.mean(values)) for name, values in stats.items()}
        metrics["ratio/mean"] = float(ratios.mean())
        metrics["ratio/min"] = float(ratios.min())
        metrics["ratio/max"] = float(ratios.max())
        metrics["ratio/max_abs_log"] = float(np.abs(np.log(ratios)).max())
        name = "onpolicy/max_abs_gap" if algorithm.objective == "awm" else "onpolicy/max_abs_log_ratio"
        metrics[name] = float(max(on_policy))
        return metrics

    @property
    def data_parallel(self) -> int:
        """How many groups are replayed at a time."""
        return self.distributed.data_parallel * len(self.replicas)

    def groups_to_read(self, batch: list[GroupBatch], first: int = 0, last: bool = True) -> set[int]:
        """The places in `batch` of the groups that this rank replays a share of in `train_step`, known from their
        outlines: of the others it needs no trajectory."""
        if self.distributed.world == 1:
            return set(range(len(batch)))
        found: set[int] = set()
        for chunk in np.array_split(np.arange(len(batch)), self.cfg.algorithm.updates_per_step):
            checked = self._looked_at(self._total(len(chunk), last))
            for at_once in self._at_once(len(chunk)):
                plan = self._plan([batch[chunk[i]] for i in at_once], [first + i in checked for i in at_once])
                mine = self.distributed.assign_micro_batches([kind for *_, kind in plan])
                found |= {int(chunk[at_once[plan[index][0]]]) for index, _ in mine}
        return found

    def _at_once(self, groups: int) -> list[range]:
        """Which of an update's next groups are replayed together: all by lanes, which need not wait for one another."""
        size = self.data_parallel if self.distributed.world > 1 else groups
        return [range(at, min(at + size, groups)) for at in range(0, groups, size)]

    def _total(self, given: int, last: bool) -> int:
        """Groups of an update whose first `given` ones are there."""
        return given if last else self.cfg.algorithm.groups_per_step

    def _looked_at(self, total: int) -> frozenset[int]:
        """Places of an update's groups whose replay is compared with the rollout's."""
        looks = self.distributed.data_parallel  # as many as compute apart, so that none waits for it
        return frozenset((self.version * looks + i) % total for i in range(looks))

    def _begin(self, groups: list[GroupBatch], last: bool) -> None:
        """A new update, of which `groups` are the first, and all if `last`."""
        total = self._total(len(groups), last)
        divisor = pairs_of(groups) * total // len(groups)
        self._update = GradientAccumulator(total, divisor=divisor, checked=self._looked_at(total))
        for lane in self.replicas:
            for parameter in adapters.trainable(lane.trained).values():
                parameter.grad = None

    def _replay(self, groups: list[GroupBatch]) -> None:
        """Adds the gradients of the update's next groups, of the loss averaged over all (take, trained step) pairs."""
        update = self._update
        looks = [update.done + i in update.checked for i in range(len(groups))]
        if self.distributed.world == 1:
            work: list[list[tuple[int, GroupBatch, bool]]] = [[] for _ in self.replicas]
            for i, (group, look) in enumerate(zip(groups, looks, strict=True)):
                work[i % len(work)].append((update.done + i, group, look))
            others = [
                self._threads.submit(self._follow, *pair) for pair in zip(self.replicas[1:], work[1:], strict=True)
            ]
            update.found |= self._follow(self.replicas[0], work[0])
            for other in others:
                update.found |= other.result()
        else:
            self._replay_share(groups, looks)
        update.done += len(groups)
        update.pairs += pairs_of(groups)

    def _follow(self, lane: Replica, work: Sequence[tuple[int, GroupBatch, bool]]) -> dict[tuple[int, int], np.ndarray]:
        """One lane's groups (place in the update, group, whether its replay is looked at). Returns the micro-batches'
        rows by (place, number)."""
        found: dict[tuple[int, int], np.ndarray] = {}
        for place, group, look in work:
            number = 0
            for part in range(len(group.held.parts)):
                micros = lane.micro_batches(group.held, part)
                for micro in micros:
                    found[place, number] = self._backward(lane, group, micro, look, 1.0)
                    number += 1
                if (live := micros[0][0].reencoded) is not None:
                    live.backward()  # through the text encoders once, with the gradients of all micro-batches
        return found

    def _backward(self, lane: Replica, group: GroupBatch, micro: MicroBatch, look: bool, scale: float) -> np.ndarray:
        """Adds the gradients of a micro-batch, times `scale`. Returns its row: [gap, LOGGED sums, ratios]."""
        loss, logs = lane.losses(group, micro, look)
        (loss.sum() / self._update.divisor * scale).backward()
        sums = [float(logs[name].sum()) for name in LOGGED]
        return np.array([float(logs["gap"].abs().max()), *sums, *logs["ratio"].cpu().numpy()])

    def _replay_share(self, groups: list[GroupBatch], looks: list[bool]) -> None:
        """This rank's share of the groups' micro-batches."""
        update, lane = self._update, self.replicas[0]
        plan = self._plan(groups, looks)
        before = len(update.sizes)
        place: tuple[int, int] | None = None
        for index, counts in self.distributed.assign_micro_batches([kind for *_, kind in plan]):
            group_at, part, at, _, _ = plan[index]
            group = groups[group_at]
            if place != (group_at, part):
                micros, place = lane.micro_batches(group.held, part), (group_at, part)
            row = self._backward(lane, group, micros[at], looks[group_at], self.distributed.loss_scale(counts))
            if counts and self.distributed.is_reporter:
                update.found[before + index] = row
        update.sizes += [1 + len(LOGGED) + size for *_, size, _ in plan]

    def _finish(self, stats: dict[str, list[Any]], *, first: bool) -> None:
        """The optimiser's update, when all its groups have been replayed."""
        update = self._update
        if update.done != update.groups:
            raise RuntimeError(f"the update has {update.done} of its {update.groups} groups")
        self._gather_lanes()
        rows = update.rows(self.distributed)
        stats["ratio_values"] += [row[1 + len(LOGGED) :].astype(np.float32) for row in rows]
        if first:
            stats["on_policy_gap"] += [float(row[0]) for row in rows]
        total = update.means(rows)
        loss_value = total["policy_loss"] + self.cfg.algorithm.kl_beta * total["kl"]
        if update.correction != 1.0:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad *= update.correction
        norm = full_tensor(
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.cfg.optimizer.max_grad_norm)
        )
        if not (np.isfinite(loss_value) and bool(torch.isfinite(norm))):
            self.optimizer.zero_grad(set_to_none=True)
            raise RunFailed(
                f"learner: loss {loss_value:.3g}, gradient norm {float(norm):.3g} at step {self.version}; "
                "lower optimizer.lr or algorithm.clip_high, or train fewer low-noise steps (sampler.window.range)"
            )
        lr = self._learning_rate()
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr
        self.optimizer.step()
        self.updates += 1
        self._update_ema()
        stats["loss"].append(loss_value)
        stats["policy_loss"].append(total["policy_loss"])
        stats["kl"].append(total["kl"])
        stats["clip/low"].append(total["clipped_low"])
        stats["clip/high"].append(total["clipped_high"])
        stats["grad_norm"].append(float(norm))
        stats["lr"].append(lr)

    def _gather_lanes(self) -> None:
        """Adds the other lanes' gradients to the first one's, in order."""
        for lane in self.replicas[1:]:
            for name, parameter in adapters.trainable(lane.trained).items():
                mine, grad = self.parameters[name], parameter.grad
                if grad is not None:
                    mine.grad = grad if mine.grad is None else mine.grad.add_(grad)
                parameter.grad = None

    def _plan(self, groups: list[GroupBatch], looks: list[bool]) -> list[tuple[int, int, int, int, Hashable]]:
        """All micro-batches of some groups, the same on every rank: (position of the group, part, position in the part,
        takes, kind), where those of a kind call the same modules equally often."""
        return [
            (group_at, part, at, takes, (calls, look and looks[group_at]))
            for group_at, group in enumerate(groups)
            for part, at, takes, (calls, look) in group.outline or micro_batch_specs(self.cfg, group.held)
        ]

    def _learning_rate(self) -> float:
        warmup = self.cfg.optimizer.warmup_steps
        return self.cfg.optimizer.lr * (min(1.0, (self.updates + 1) / warmup) if warmup else 1.0)

    @torch.no_grad()
    def _update_ema(self) -> None:
        if not self.ema:
            return
        # Ramped up, so that short runs are not held back by the starting weights.
        decay = min(self.cfg.optimizer.ema_decay, (1.0 + self.updates) / (10.0 + self.updates))
        for name, parameter in self.parameters.items():
            self.ema[name].lerp_(parameter.detach(), 1.0 - decay)

    # -- weights out, state in and out ------------------------------------------------------------------------------

    def weights(self, tag: Literal["train", "ema"] = "train") -> WeightSet:
        """The trained weights, or their EMA (the same where no EMA is kept), in the dtype rollouts use.

        Of several ranks all must call; rank 0 gets the weights, the others an empty set. So with `state`.
        """
        source = self.ema if tag == "ema" and self.ema else self.parameters
        kind = self.cfg.trainable.kind
        return adapters.to_weight_set(kind, self._gathered({n: t.to(self._wire_dtype) for n, t in source.items()}))

    def _gathered(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Out of their shards, on rank 0; in the CPU's memory where they were sharded."""
        found = {}
        for name, tensor in tensors.items():
            value = full_tensor(tensor.detach())
            if self.distributed.is_main:
                found[name] = value if self.distributed.world == 1 else value.cpu()
        return found

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything needed to go on: weights, EMA, optimiser moments; version and update counters."""
        tensors: dict[str, torch.Tensor] = {f"weights/{n}": p for n, p in self.parameters.items()}
        tensors |= {f"ema/{n}": t for n, t in self.ema.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        copies = {name: tensor.cpu().clone() for name, tensor in self._gathered(tensors).items()}
        return copies, {"version": self.version, "updates": self.updates}

    def load_state(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Restores `state()`. Raises CheckpointError naming the first tensor that is missing or unexpected."""
        expected = {f"weights/{n}" for n in self.parameters} | {f"ema/{n}" for n in self.ema}
        found = {n for n in tensors if not n.startswith("optimizer/")}
        if expected != found:
            odd = sorted(expected ^ found)
            raise CheckpointError(f"checkpoint does not fit this config: {len(odd)} tensors differ, such as {odd[0]}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                copy_into(parameter, tensors[f"weights/{name}"])
            for name, value in self.ema.items():
                copy_into(value, tensors[f"ema/{name}"])
        for name, parameter in self.parameters.items():
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                stored = tensors.get(f"optimizer/{key}/{name}")
                if stored is not None:
                    state[key] = stored.clone() if key == "step" else shard_like(stored, parameter.detach())
            if state:
                self.optimizer.state[parameter] = state
        self.version, self.updates = int(meta["version"]), int(meta["updates"])


def _no_dropout(module: torch.nn.Module) -> None:
    """Train mode without dropout: the replayed policy must be the one that sampled."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.dropout._DropoutNd):
            layer.eval()
