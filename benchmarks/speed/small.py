"""What lies between the roles: queues, a reward server's call, and weights against a copy of the same bytes."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.ray_options import RunContext, to_bytes
from actors.reward_server import RewardServer
from actors.worker_pool import WorkerPool
from actors.worker_slot import WorkerSlot
from pipeline.config.resources import WorkerRange
from pipeline.config.schema import Config
from pipeline.core.tensors import checksum, unpack
from pipeline.core.types import Media, PromptItem
from pipeline.generators.adapters import to_weight_set
from pipeline.rl.group_plan import train_work

SCORER = "def one(frames, prompts):\n    return [1.0] * len(prompts)\none.batched = True\n"
WEIGHTS = {"lora, 20 MB": (400, 12_500), "full, 400 MB": (400, 250_000)}  # tensors, float32 values each


def queue_round_trip(workers: int, items: int = 5000) -> float:
    """Seconds from a request for a worker to its end, two at a time, with so many workers in the pool."""
    ctx = RunContext(cfg=_config(Path()), run_path="unused", cwd="unused")
    limits = WorkerRange(workers, workers)
    pool = WorkerPool(ctx, object, "rollout", limits, resources={}, threads=1, start_args=(), capacity=8)
    pool.slots = [WorkerSlot(f"rollout-{i}") for i in range(workers)]

    async def requests() -> None:
        for item in range(items // 2):
            async with pool.lease(priority=(item,)):
                await asyncio.sleep(0)

    async def body() -> float:
        for slot in pool.slots:
            pool.offer(slot)
        started = time.perf_counter()
        await asyncio.gather(requests(), requests())
        return (time.perf_counter() - started) / items

    return asyncio.run(body())


def _config(folder: Path) -> Config:
    return Config.model_validate(
        {
            "generator": {"pretrained": "unused"},
            "prompts": {"train": "unused.txt"},
            "step": {"takes": 16},
            "rewards": {"one": {"scorer": f"{folder / 'one.py'}:one"}},
            "ray": {"address": "local", "init": {"num_cpus": 4, "object_store_memory": 1536 * 2**20}},
        }
    )


def reward_server(cfg: Config, folder: Path) -> float:
    """Seconds that a scoring call takes beyond the scorer's own time, for 16 takes of 512 x 512 pixels."""
    ctx = RunContext(cfg=cfg, run_path=str(folder), cwd=os.getcwd())
    server: Any = ray.remote(RewardServer).options(num_cpus=0).remote(ctx, "reward.one-0")
    prompt = PromptItem(index=0, text="x")
    work = train_work(cfg, 0, 0, prompt)
    ray.get(server.start.remote("one", [prompt]))
    media = ray.put(Media(frames=np.zeros((16, 1, 512, 512, 3), np.uint8), fps=8.0))
    overheads = []
    for group in range(40):
        started = time.perf_counter()
        (scores,) = ray.get(server.score.remote(to_bytes([replace(work, group=group)]), media))
        overheads.append(time.perf_counter() - started - scores.seconds)
    ray.kill(server)
    return float(np.median(overheads[5:]))


class Holder:
    """A worker's side of a weight update, without the model."""

    def __init__(self, tensors: int, values: int) -> None:
        self.held = {f"layer{i}": torch.zeros(values) for i in range(tensors)}

    def load(self, refs: list[Any]) -> dict[str, float]:
        """Pull, apply, checksum; and a plain copy of the same bytes."""
        started = time.perf_counter()
        weights = ray.get(refs[0])
        pulled = time.perf_counter()
        for name, tensor in weights.tensors.items():
            self.held[name].copy_(unpack(tensor))
        applied = time.perf_counter()
        checksum(weights.tensors)
        checked = time.perf_counter()
        source = [tensor.clone() for tensor in self.held.values()]
        copying = time.perf_counter()
        for tensor, other in zip(self.held.values(), source, strict=True):
            tensor.copy_(other)
        copied = time.perf_counter()
        return {
            "pull_s": pulled - started,
            "apply_s": applied - pulled,
            "checksum_s": checked - applied,
            "plain_copy_s": copied - copying,
        }


def weight_sync(tensors: int, values: int) -> dict[str, float]:
    """Seconds of each part of a weight update on one node, and of a plain copy of the same bytes."""
    source = {f"layer{i}": torch.randn(values) for i in range(tensors)}
    holder: Any = ray.remote(Holder).options(num_cpus=0).remote(tensors, values)
    rows = []
    for _ in range(4):
        started = time.perf_counter()
        weights = to_weight_set("lora", source)
        packed = time.perf_counter()
        reference = ray.put(weights)
        put = time.perf_counter()
        rows.append({"pack_s": packed - started, "put_s": put - packed, **ray.get(holder.load.remote([reference]))})
        del reference, weights
    ray.kill(holder)
    medians = {key: float(np.median([row[key] for row in rows[1:]])) for key in rows[0]}
    medians["total_s"] = sum(value for key, value in medians.items() if key != "plain_copy_s")
    return {**medians, "times_a_plain_copy": medians["total_s"] / medians["plain_copy_s"]}


def small_costs(say: Callable[[str], None]) -> dict[str, Any]:
    """All of them; starts a local Ray."""
    from jobs.cluster.ray_session import RaySession

    say("queues")
    costs: dict[str, Any] = {f"queue_round_trip_s_{n}_workers": queue_round_trip(n) for n in (1, 256)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "one.py").write_text(SCORER)
        cfg = _config(folder)
        with RaySession(cfg):
            say("reward server")
            costs["reward_server_overhead_s"] = reward_server(cfg, folder)
            say("weights")
            costs["weights"] = {label: weight_sync(*shape) for label, shape in WEIGHTS.items()}
    return costs
