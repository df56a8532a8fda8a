"""Several processes as one learner: which rank replays which micro-batch, FSDP2 sharding, context parallelism.

Weights, gradients, EMA and optimiser moments are sharded over all ranks; each rank replays the micro-batches assigned
to it. Statistics are summed over the ranks, so all ranks log the same and agree whether the loss is finite. Plain
torch.distributed, no Ray.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.core.errors import UnsupportedPolicyError, one_line
from pipeline.generators.load.blocks import repeated_blocks

TIMEOUT = datetime.timedelta(minutes=30)  # of one collective; a dead rank is noticed earlier, when its actor ends


@dataclass(frozen=True, slots=True)
class Assignment:
    """A micro-batch that a rank computes."""

    index: int
    counts: bool  # False: computed only because the other ranks make the same collective calls


def assign_micro_batches(kinds: Sequence[Hashable], parts: int, part: int) -> list[Assignment]:
    """The micro-batches that number `part` of `parts` computes, in order.

    `kinds[i]` says which sharded modules micro-batch i calls, and how often. All ranks take part in each of these
    calls, so all get the same sequence of kinds; where a kind does not divide evenly, a rank repeats a micro-batch that
    does not count. Neighbours stay together, so that a rank needs the data of few groups.
    """
    if parts == 1:
        return [Assignment(index, True) for index in range(len(kinds))]
    members: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        members.setdefault(kind, []).append(index)
    assigned: list[Assignment] = []
    for indices in members.values():
        size = -(-len(indices) // parts)
        mine = indices[part * size : (part + 1) * size]
        repeated = mine[-1] if mine else indices[0]
        assigned += [Assignment(index, True) for index in mine]
        assigned += [Assignment(repeated, False)] * (size - len(mine))
    return assigned


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A copy of the unsharded `value`, on the target's device and sharded like it. No communication."""
    value = value.to(target.device, copy=True)
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def copy_into(target: torch.Tensor, value: torch.Tensor) -> None:
    """Overwrites `target`, sharded or not, with the unsharded `value`."""
    local = shard_like(value, target)
    if isinstance(target, DTensor) and isinstance(local, DTensor):
        target.to_local().copy_(local.to_local())
    else:
        target.copy_(local)


@dataclass(frozen=True)
class DistributedContext:
    """The ranks of one learner, seen from one of them. The default is a learner of one process."""

    rank: int = 0
    world: int = 1
    context: int = 1  # context-parallel group: neighbouring ranks that split the sequence of one micro-batch
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None  # all ranks
    context_mesh: DeviceMesh | None = None  # ("data", "ring", "ulysses")

    @property
    def is_main(self) -> bool:
        """Whether this rank returns weights and state."""
        return self.rank == 0

    @property
    def data_parallel(self) -> int:
        """How many micro-batches are computed at the same time, each by one context-parallel group of ranks."""
        return self.world // self.context

    def assign_micro_batches(self, kinds: Sequence[Hashable]) -> list[Assignment]:
        """This rank's micro-batches. The ranks of one context-parallel group compute the same ones together."""
        return assign_micro_batches(kinds, self.data_parallel, self.rank // self.context)

    @property
    def is_reporter(self) -> bool:
        """Whether this rank adds to the rows that `collect` sums: one of each context-parallel group does."""
        return self.rank % self.context == 0

    def loss_scale(self, counts: bool) -> float:
        """The factor of a rank's loss. FSDP2 averages gradients over the ranks, and the learner needs their sum. Each
        rank of a context-parallel group has the gradient of its part of the sequence, so all of them count."""
        return float(self.world) if counts else 0.0

    def collect(self, rows: dict[Any, np.ndarray], sizes: Sequence[int] | None) -> list[np.ndarray]:
        """The rows (float64 [sizes[i]]) of all ranks in order, on every rank. `sizes` None: a single rank has all."""
        if sizes is None:
            return [rows[index] for index in sorted(rows)]
        padded = [rows.get(index, np.zeros(size)) for index, size in enumerate(sizes)]
        return np.split(self._summed(np.concatenate(padded)), np.cumsum(sizes)[:-1])

    def _summed(self, values: np.ndarray) -> np.ndarray:
        summed = torch.from_numpy(values).to(self.device)
        dist.all_reduce(summed)
        return summed.cpu().numpy()

    def union(self, chosen: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """Those of `candidates` (the same on every rank) that any rank has chosen."""
        if self.world == 1:
            return list(chosen)
        flags = self._summed(np.array([float(item in chosen) for item in candidates]))
        return [item for item, flag in zip(candidates, flags, strict=True) if flag > 0]

    # ------------------------------------------------------------------------------------------- modules

    def shard(self, modules: dict[str, torch.nn.Module]) -> None:
        """FSDP2 over the repeated blocks and the rest, in place; the weights move to this rank's device."""
        if self.mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        for module in modules.values():
            for part in [*repeated_blocks(module).values(), module]:
                fully_shard(part, mesh=self.mesh, reshard_after_forward=True)
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.device)

    def split_context(self, modules: dict[str, torch.nn.Module]) -> None:
        """Splits the denoisers' sequence over `context` ranks, by the model's context-parallel plan in diffusers.

        Raises `UnsupportedPolicyError` where diffusers has none.
        """
        if self.context_mesh is None:
            return
        from diffusers import ContextParallelConfig
        from diffusers.models._modeling_parallel import ParallelConfig

        mesh = self.context_mesh["ring", "ulysses"]
        for name, module in modules.items():
            if getattr(module, "_cp_plan", None) is None or not hasattr(module, "enable_parallelism"):
                raise UnsupportedPolicyError(
                    f"learner.context_parallel: {type(module).__name__} ({name}) has no context-parallel plan in "
                    "diffusers; set learner.context_parallel=1 (learner.ranks still shards weights and takes)"
                )
            config = ContextParallelConfig(ulysses_degree=self.context, mesh=mesh)
            if self.device.type == "cpu":  # diffusers asks for the index of an accelerator
                settings = ParallelConfig(context_parallel_config=config)
                settings.setup(self.rank, self.world, self.device, mesh=mesh)

                def resolved(_: Any, module: Any = module, settings: Any = settings) -> Any:
                    module._parallel_config = settings
                    return settings

                module._resolve_parallel_config = resolved  # type: ignore[assignment]
            try:
                module.enable_parallelism(config=config)  # type: ignore[operator]
            except ValueError as error:
                raise UnsupportedPolicyError(
                    f"learner.context_parallel: {type(module).__name__} ({name}): {one_line(error, 600)}"
                ) from error


# ------------------------------------------------------------------------------------------- rendezvous


def listen(host: str) -> socket.socket:
    """A socket listening on a free port of `host` only, through which the ranks find rank 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind((host, 0))
    opened.listen(128)
    return opened


def join(
    rank: int,
    world: int,
    address: tuple[str, int],
    device: torch.device,
    context: int = 1,
    listening: socket.socket | None = None,
) -> DistributedContext:
    """Joins the process group at rank 0's `address` (whose socket is `listening`); returns once all ranks have."""
    host, port = address
    _use_interface(host if rank == 0 else _own_address(host, port))
    store = dist.TCPStore(
        host,
        port,
        world,
        is_master=rank == 0,
        timeout=TIMEOUT,
        master_listen_fd=listening.detach() if listening is not None else None,
        use_libuv=True,
    )
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    mesh = init_device_mesh(device.type, (world,))
    split = None
    if context > 1:
        split = init_device_mesh(
            device.type, (world // context, 1, context), mesh_dim_names=("data", "ring", "ulysses")
        )
    return DistributedContext(rank, world, context, device, mesh, split)


def _own_address(host: str, port: int) -> str:
    """This machine's address on the route to rank 0."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return probe.getsockname()[0]


def _use_interface(address: str) -> None:
    """Makes Gloo and NCCL listen on the interface of this address only, unless the environment names another."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return
