"""A learner rank: an actor around `pipeline.learner.learner` and `pipeline.learner.distributed`.

Every rank gets every call, in the same order (`actors.learner_group`); only the answers of rank 0 are used.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from actors.heartbeat import start_heartbeat
from actors.ray_errors import is_lost
from actors.ray_options import RunContext, cores
from actors.role_actor import RoleActor, use_threads
from pipeline.core.types import GroupBatch, PolicyTag, WeightSet
from pipeline.runs import checkpoint, remote_sync


@dataclass(frozen=True, slots=True)
class TrainStepResult:
    """Rank 0's answer to `train_step`."""

    version: int  # of the learner after the call
    metrics: dict[str, float] = field(default_factory=dict)  # of the step, after its last call
    lost: list[int] = field(
        default_factory=list
    )  # positions in the call of gone trajectories; nothing has changed then


class LearnerActor(RoleActor):
    role = "learner"
    _listening: socket.socket | None = None

    def __init__(self, ctx: RunContext, name: str) -> None:
        super().__init__(ctx, name)
        start_heartbeat()

    def open_rendezvous(self) -> tuple[str, int]:
        """Rank 0: the node's address and a free port of it, where the ranks meet."""
        from pipeline.learner.distributed import listen

        host = ray.util.get_node_ip_address()
        self._listening = listen(host)
        return host, self._listening.getsockname()[1]

    def start(
        self, resume_from: str | None, rank: int = 0, address: tuple[str, int] | None = None, on_node: int = 1
    ) -> dict[str, Any]:
        """Loads the denoisers, and a checkpoint's state. `address`: where the ranks meet, if there are several;
        `on_node`: how many of them share this node's cores. Raises `RushesError` (bad generator or checkpoint).
        """
        from pipeline.core.devices import resolve_device
        from pipeline.learner.distributed import DistributedContext, join
        from pipeline.learner.learner import Learner

        settings = self.cfg.learner
        with self.doing("starting"):
            use_threads(settings.threads or cores() // on_node)
            device, ranks = resolve_device(settings.device), DistributedContext()
            if address is not None:
                ranks = join(rank, settings.ranks, address, device, settings.context_parallel, self._listening)
            self.learner = Learner(self.cfg, settings.device, ranks)
            if resume_from is not None:
                tensors, state = checkpoint.load(Path(resume_from))
                self.learner.load_state(tensors, state["learner"])
        return {**self.info(), "version": self.learner.version, "device": str(self.learner.device)}

    def train_step(self, groups: list[GroupBatch], first: int, last: bool) -> TrainStepResult:
        """`groups`: in id order, from position `first` of the step, which ends with them if `last`. Their trajectories
        are references; of several ranks, each reads those that it replays."""
        with self.doing(f"training step {self.learner.version}"):
            batch = [replace(group, trajectory=None) for group in groups]
            lost = []
            for position in sorted(self.learner.groups_to_read(batch, first, last)):
                reference: Any = groups[position].trajectory
                try:
                    batch[position] = replace(batch[position], trajectory=ray.get(reference))
                except Exception as error:
                    if not is_lost(error):
                        raise
                    self.log.warning("trajectory at position %d lost: %s", first + position, type(error).__name__)
                    lost.append(position)
            lost = self.learner.distributed.union(lost, range(len(groups)))
            if lost:
                return TrainStepResult(self.learner.version, lost=lost)
            metrics = self.learner.train_step(batch, first, last)
        return TrainStepResult(self.learner.version, metrics=metrics or {})

    def weights(self, tag: PolicyTag) -> tuple[dict[str, Any], WeightSet]:
        """Two objects: {"number", "checksum"} and the weights. The caller owns both."""
        with self.doing("packing weights"):
            weights = self.learner.weights(tag)
        return {"number": self.learner.version, "checksum": weights.checksum}, weights

    def save(self, root: str, controller: dict[str, Any], keep: int, best: int | None) -> str:
        """Writes checkpoint `root/step-<version>`; returns its path. The newest `keep` stay, and that of step `best`.
        Raises `CheckpointError`."""
        with self.doing("saving"):
            if controller["version"] != self.learner.version:
                raise RuntimeError(f"learner is at {self.learner.version}, controller at {controller['version']}")
            tensors, meta = self.learner.state()
            if not self.learner.distributed.is_main:
                return ""
            version = self.learner.version
            folder = checkpoint.save(Path(root), version, tensors, meta, controller, self.cfg, keep, best)
        return str(folder)

    def export(self, out: str, source: str | None) -> str:
        """Writes the trained policy (its EMA, where kept) for plain diffusers; returns the path. `source`: the
        checkpoint whose weights are exported instead of the present ones. Raises `CheckpointError`."""
        from pipeline.generators.export import export_full, export_lora
        from pipeline.runs.trained_weights import read_weights

        with self.doing("exporting"):
            if source is None:
                weights = self.learner.weights(self.cfg.eval_weights_tag)
            else:
                weights = read_weights(Path(source), self.cfg.trainable.kind)
            if self.learner.distributed.is_main:
                write = export_lora if self.cfg.trainable.kind == "lora" else export_full
                write(self.cfg, weights, Path(out))
                remote_sync.push_tree(Path(out), self.ctx.run.path)
        return out
