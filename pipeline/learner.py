"""The GRPO learner: replays trajectories with gradients on, and takes optimiser steps. Plain torch, no Ray.

One optimisation step = `updates_per_step` optimiser updates, each over whole groups. A micro-batch is one trained
transition of some takes of one group, so its inputs are exactly the recorded ones (objective awm: several of them, with
`learner.micro_batch` above the group size). With several ranks (`pipeline.ranks`) each replays its share of the
micro-batches, and every call belongs to all ranks together.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from pipeline import weights as weights_lib
from pipeline.config import Config
from pipeline.errors import CheckpointError, RunFailed, UnsupportedPolicyError
from pipeline.generators.live_text import LiveText, reference_inputs
from pipeline.generators.loading import (
    denoisers_of,
    load_denoisers,
    load_pipeline,
    resolve_device,
    resolve_dtype,
    trained_modules,
)
from pipeline.generators.merging import merged
from pipeline.generators.replay import Replayer
from pipeline.generators.spec import PolicySpec
from pipeline.objectives import OBJECTIVES, Terms, matching
from pipeline.ranks import Ranks, copy_into, like, whole
from pipeline.samplers import Transition, log_prob
from pipeline.samplers.transition import gaussian_kl
from pipeline.types import GroupBatch, Trajectory, WeightSet
from pipeline.update import LOGGED, Update, pairs_of

MicroBatch = tuple[Replayer, int, slice]  # the replayed takes of its trained step j


class Learner:
    """Holds the denoisers (and text encoders, where these are trained), the optimiser and the EMA. `version` counts
    finished optimisation steps."""

    def __init__(self, cfg: Config, device: str = "auto", ranks: Ranks | None = None) -> None:
        self.cfg = cfg
        self.device = resolve_device(device)
        self.ranks = ranks or Ranks()
        self.version = 0
        self.updates = 0
        self._update = Update(0, 1, frozenset())
        wire = resolve_dtype(cfg.generator.dtype, self.device)
        full = cfg.trainable.kind == "full"
        # Full weights are mastered in float32; under a LoRA the frozen base may stay in the sampling dtype.
        base = torch.float32 if full or cfg.learner.autocast != "none" else wire
        if cfg.generator.quantize != "none":
            base = wire  # rounded from the same weights as the rollouts'
        self._wire_dtype = wire if full else torch.float32
        self.text: LiveText | None = None
        if cfg.trainable.modules == "denoiser":
            # Shards go to the device block by block: the whole model need not fit there.
            at_first = self.device if self.ranks.world == 1 else torch.device("cpu")
            self.modules = self.trained = load_denoisers(cfg.generator, at_first, base)
        else:
            pipe = load_pipeline(cfg.generator, self.device)
            self.modules = denoisers_of(pipe)
            if base != wire:
                for module in self.modules.values():
                    module.to(base)
            self.trained = trained_modules(pipe, cfg.trainable)
            self.text = LiveText(pipe, cfg.generator)
        needs_reference = cfg.algorithm.kl_beta > 0
        self._reference = copy.deepcopy(self.modules) if full and needs_reference else None
        weights_lib.attach(self.trained, cfg.trainable, cfg.run.seed)
        if cfg.learner.activation_checkpointing:
            for module in self.modules.values():
                module.enable_gradient_checkpointing()  # type: ignore[operator]
                module.train()  # diffusers recomputes activations only in train mode; see _no_dropout
                _no_dropout(module)
        for modules in (self.modules, self._reference or {}):
            self.ranks.split_context(modules)
            self.ranks.shard(modules)
        self.parameters = weights_lib.trainable(self.trained)
        opt = cfg.optimizer
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=opt.lr,
            betas=(opt.beta1, opt.beta2),
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
        portion is a multiple of `Ranks.apart` groups.
        Raises RunFailed when a gradient or the loss is not finite (the weights are left as they were).
        """
        stats: dict[str, list[Any]] = defaultdict(list)
        algorithm = self.cfg.algorithm
        for number, chunk in enumerate(np.array_split(np.arange(len(batch)), algorithm.updates_per_step)):
            groups = [batch[i] for i in chunk]
            if first == 0:
                self._begin(groups, len(groups) if last else algorithm.groups_per_step)
            if self._update.done != first:
                raise RuntimeError(f"group {first} of the step was given, expected was {self._update.done}")
            for at in range(0, len(groups), self.ranks.apart):
                self._replay(groups[at : at + self.ranks.apart])
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

    def _begin(self, groups: list[GroupBatch], total: int) -> None:
        """A new update of `total` groups, of which `groups` are the first."""
        looks = self.ranks.apart  # as many as compute apart, so that none waits for it
        turns = frozenset((self.version * looks + i) % total for i in range(looks))
        self._update = Update(total, divisor=pairs_of(groups) * total // len(groups), looked_at=turns)
        self.optimizer.zero_grad(set_to_none=True)

    def _replay(self, groups: list[GroupBatch]) -> None:
        """Adds the gradients of the update's next groups, of the loss averaged over all (take, trained step) pairs."""
        update = self._update
        self._checked = {
            group.trajectory.group for i, group in enumerate(groups) if update.done + i in update.looked_at
        }
        plan = None if self.ranks.world == 1 else self._plan(groups)
        before = len(update.found) if plan is None else len(update.sizes)
        for index, group, (replayer, j, takes), counts in self._work(groups, plan):
            advantages = self._advantages(group, replayer, takes)
            micro_loss = self._matching_loss if self.cfg.algorithm.objective == "awm" else self._micro_loss
            loss, logs = micro_loss(group.trajectory, replayer, j, takes, advantages)
            mean = loss.sum() / update.divisor
            (mean if plan is None else mean * self.ranks.gradient_part(counts)).backward()
            if counts and self.ranks.records:
                sums = [float(logs[name].sum()) for name in LOGGED]
                row = [float(logs["gap"].abs().max()), *sums, *logs["ratio"].cpu().numpy()]
                update.found[before + index] = np.array(row)
        if plan is not None:
            update.sizes += [1 + len(LOGGED) + size for *_, size, _ in plan]
        update.done += len(groups)
        update.pairs += pairs_of(groups)

    def _finish(self, stats: dict[str, list[Any]], *, first: bool) -> None:
        """The optimiser's update, when all its groups have been replayed."""
        update = self._update
        if update.done != update.groups:
            raise RuntimeError(f"the update has {update.done} of its {update.groups} groups")
        rows = update.rows(self.ranks)
        stats["ratio_values"] += [row[1 + len(LOGGED) :].astype(np.float32) for row in rows]
        if first:
            stats["on_policy_gap"] += [float(row[0]) for row in rows]
        total = update.means(rows)
        loss_value = total["policy_loss"] + self.cfg.algorithm.kl_beta * total["kl"]
        if update.correction != 1.0:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad *= update.correction
        norm = whole(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.cfg.optimizer.max_grad_norm))
        if not (np.isfinite(loss_value) and bool(torch.isfinite(norm))):
            self.optimizer.zero_grad(set_to_none=True)
            raise RunFailed(
                f"learner: loss {loss_value:.3g}, gradient norm {float(norm):.3g} at step {self.version}; "
                "lower optimizer.lr or algorithm.clip_high, or train fewer low-noise steps (sampler.window.stop)"
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

    def _work(
        self, groups: list[GroupBatch], plan: list[tuple[int, int, int, int, Hashable]] | None
    ) -> Iterator[tuple[int, GroupBatch, MicroBatch, bool]]:
        """(number, group, micro-batch, whether it counts): all of the update's, or this rank's share of the plan."""
        if plan is None:
            number = 0
            for group in groups:
                for part in range(len(group.trajectory.parts)):
                    micros = self._micro_batches(group.trajectory, part, self.device)
                    for micro in micros:
                        yield number, group, micro, True
                        number += 1
                    if (live := micros[0][0].live) is not None:
                        live.backward()  # through the text encoders once, with the gradients of all micro-batches
            return
        place: tuple[int, int] | None = None
        for index, counts in self.ranks.share([kind for *_, kind in plan]):
            group_at, part, at, _, _ = plan[index]
            group = groups[group_at]
            if place != (group_at, part):
                micros, place = self._micro_batches(group.trajectory, part, self.device), (group_at, part)
            yield index, group, micros[at], counts

    def _plan(self, groups: list[GroupBatch]) -> list[tuple[int, int, int, int, Hashable]]:
        """All micro-batches of an update, the same on every rank: (position of the group, part, position in the part,
        takes, kind), where those of a kind call the same modules equally often."""
        plan: list[tuple[int, int, int, int, Hashable]] = []
        for group_at, group in enumerate(groups):
            for part in range(len(group.trajectory.parts)):
                micros = self._micro_batches(group.trajectory, part, torch.device("cpu"))
                for at, (replayer, j, takes) in enumerate(micros):
                    calls = tuple(call.module for call in replayer.part.steps[j].calls)
                    looks = self._looks_at_replay(group.trajectory, replayer, j, takes)
                    plan.append((group_at, part, at, takes.stop - takes.start, (calls, looks)))
        return plan

    def _micro_batches(self, trajectory: Trajectory, number: int, device: torch.device) -> list[MicroBatch]:
        """Those of one part of a trajectory."""
        part = trajectory.parts[number]
        replayer = Replayer(part, PolicySpec.from_dict(trajectory.spec), self.modules, device)
        if self.text is not None:
            self.text.attach(replayer, trajectory.sampling)
        size = self.cfg.learner.micro_batch or replayer.total
        joinable = self.cfg.algorithm.objective == "awm" and self.text is None
        if joinable and (joined := merged(replayer, size)):
            return [(several, 0, slice(0, several.total)) for several in joined]
        starts = range(0, replayer.total, size)
        return [
            (replayer, j, slice(start, min(start + size, replayer.total)))
            for j in range(len(part.steps))
            for start in starts
        ]

    def _advantages(self, group: GroupBatch, replayer: Replayer, takes: slice) -> torch.Tensor:
        part = replayer.plain.part
        own = np.tile(group.advantages[part.start : part.stop], replayer.total // replayer.plain.total)[takes]
        return torch.from_numpy(np.array(own, np.float32)).to(self.device)

    def _transition(
        self, trajectory: Trajectory, replayer: Replayer, j: int, takes: slice, x: torch.Tensor
    ) -> Transition:
        """The policy's Gaussian at trained step `j`, from a fresh denoiser call."""
        return replayer.move(j, takes, x, self._output(replayer, j, takes, x), trajectory.sampling)

    def _output(self, replayer: Replayer, j: int, takes: slice, x: torch.Tensor) -> torch.Tensor:
        """What the scheduler would be given at step `j` for the sample x [b, ...]."""
        with torch.autocast(
            self.device.type,
            dtype=getattr(torch, self.cfg.learner.autocast, None),
            enabled=self.cfg.learner.autocast != "none",
        ):
            return replayer.model_output(j, takes, x)

    def _micro_loss(
        self, trajectory: Trajectory, replayer: Replayer, j: int, takes: slice, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss per take [b] of one transition, with gradients, and detached logs [b]."""
        algorithm = self.cfg.algorithm
        x, x_next, old = replayer.step_tensors(j, takes)
        step = self._transition(trajectory, replayer, j, takes, x)
        logp = log_prob(x_next, step)
        terms = Terms(
            log_prob=logp,
            old_log_prob=old,
            advantages=advantages,
            step=step,
            old_mean=replayer.old_mean(j, takes) if replayer.part.steps[j].mean is not None else None,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
        )
        policy_loss, logs = OBJECTIVES[algorithm.objective](terms)
        loss = policy_loss
        kl = torch.zeros_like(policy_loss)
        if algorithm.kl_beta > 0:
            # Closed form between Gaussians of equal std (per dimension); only the reference is outside the graph.
            reference = self._reference_output(replayer, j, takes, x)
            kl = gaussian_kl(step, replayer.move(j, takes, x, reference, trajectory.sampling).mean)
            loss = loss + algorithm.kl_beta * kl
        logs = {**logs, "gap": (logp - old).detach(), "policy_loss": policy_loss.detach(), "kl": kl.detach()}
        return loss, logs

    def _matching_loss(
        self, trajectory: Trajectory, replayer: Replayer, j: int, takes: slice, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same for `awm`: finished takes are noised to step `j`'s sigma and their flow-matching error weighed."""
        step = replayer.part.steps[j]
        if replayer.spec.prediction != "flow" or not replayer.takes_any_sample(j):
            raise UnsupportedPolicyError(
                f"algorithm.objective: awm needs a flow model whose denoiser is given the sample itself; "
                f"{replayer.spec.pipeline} predicts {replayer.spec.prediction}; use grpo"
            )
        x0 = replayer.clean(takes).float()
        sigma, eps = self._noise(trajectory, replayer, j, takes, x0)
        noised = ((1.0 - sigma).float() * x0 + sigma.float() * eps).to(getattr(torch, step.sample.dtype))
        velocity = self._output(replayer, j, takes, noised).float()
        policy_loss, logs = matching(velocity, eps - x0, advantages)
        loss, kl = policy_loss, torch.zeros_like(policy_loss)
        if self.cfg.algorithm.kl_beta > 0:
            kl = (velocity - self._reference_output(replayer, j, takes, noised).float()).pow(2).flatten(1).mean(1)
            loss = loss + self.cfg.algorithm.kl_beta * kl
        return loss, {**logs, "gap": self._replay_gap(trajectory, replayer, j, takes), "kl": kl.detach()}

    def _noise(
        self, trajectory: Trajectory, replayer: Replayer, j: int, takes: slice, x0: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sigmas (float64 [b, 1, ...]) and noise (like x0 [b, ...]) of the takes."""
        steps, copies = replayer.steps_of(j), replayer.plain.total
        sigma = torch.tensor([step.sigma for step in steps], dtype=torch.float64, device=x0.device)
        noise = [matching_noise(self.cfg.run.seed, trajectory.group, step.index, x0[0]) for step in steps]
        sigma = sigma.repeat_interleave(copies)[takes].reshape(-1, *[1] * (x0.ndim - 1))
        return sigma, torch.stack(noise).repeat_interleave(copies, 0)[takes]

    def _looks_at_replay(self, trajectory: Trajectory, replayer: Replayer, j: int, takes: slice) -> bool:
        """Objective awm: the check costs a forward pass that serves nothing else, so one step of one group (a rank) is
        looked at, in turn."""
        first = replayer.steps_of(j)[0] is replayer.plain.part.steps[0] and takes.start == 0
        return self.cfg.algorithm.objective == "awm" and first and trajectory.group in self._checked

    @torch.no_grad()
    def _replay_gap(self, trajectory: Trajectory, replayer: Replayer, j: int, takes: slice) -> torch.Tensor:
        """How far a replayed deterministic step is from the rollout's: 0 on-policy."""
        if not self._looks_at_replay(trajectory, replayer, j, takes):
            return torch.zeros(1)
        if replayer.plain is not replayer:
            replayer, takes = replayer.plain, slice(0, replayer.plain.total)
        x, x_next = replayer.samples(j, takes)
        return (self._transition(trajectory, replayer, j, takes, x).mean.to(x_next.dtype) - x_next).float()

    @torch.no_grad()
    def _reference_output(self, replayer: Replayer, j: int, takes: slice, x: torch.Tensor) -> torch.Tensor:
        """The starting policy's output: adapter off (LoRA) or the frozen copy (full weights)."""
        if self._reference is None:
            with weights_lib.adapters_off(self.trained), reference_inputs(replayer):
                return self._output(replayer, j, takes, x)
        other = Replayer(replayer.part, replayer.spec, self._reference, self.device)
        return self._output(other, j, takes, x)

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
        return weights_lib.to_weight_set(kind, self._gathered({n: t.to(self._wire_dtype) for n, t in source.items()}))

    def _gathered(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Out of their shards, on rank 0; in the CPU's memory where they were sharded."""
        found = {}
        for name, tensor in tensors.items():
            value = whole(tensor.detach())
            if self.ranks.main:
                found[name] = value if self.ranks.world == 1 else value.cpu()
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
                    state[key] = stored.clone() if key == "step" else like(stored, parameter.detach())
            if state:
                self.optimizer.state[parameter] = state
        self.version, self.updates = int(meta["version"]), int(meta["updates"])


def matching_noise(run_seed: int, group: int, index: int, like: torch.Tensor) -> torch.Tensor:
    """The noise that the finished takes of `group` get at sampler step `index`: like one take, float32, the same after
    a resume. One for the whole group: what is common to its takes cancels, since advantages sum to zero."""
    seed = int(np.random.SeedSequence([run_seed, group, index, 0xA3]).generate_state(1)[0])
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


def _no_dropout(module: torch.nn.Module) -> None:
    """Train mode without dropout: the replayed policy must be the one that sampled."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.dropout._DropoutNd):
            layer.eval()
