"""What every role actor shares: the run's context, its log, its threads, and what it says about itself."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from actors.prometheus import RoleMetrics
from actors.ray_errors import WorkerPreempted
from pipeline.config.schema import Config
from pipeline.runs.paths import RunDir, setup_logging

PROJECT = Path(__file__).resolve().parents[1]
IDLE = "idle"
MAX_START_S = 1800.0  # loading a model from a slow disk may take long; beyond this a start counts as stuck


@dataclass(frozen=True)
class RunContext:
    """What an actor needs to know of its run."""

    cfg: Config
    run_path: str  # absolute
    cwd: str  # the driver's working directory; relative paths of the config mean this one

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.run_path))


class RoleActor:
    """Base of the actor classes. `name` is e.g. `rollout-0`; it is also the label in the Ray dashboard."""

    role = "actor"
    hands_back = False  # whether SIGTERM lets it finish the group in hand; else Ray's handler ends it at once

    def __init__(self, ctx: RunContext, name: str) -> None:
        self.ctx, self.cfg, self.name = ctx, ctx.cfg, name
        if os.path.isdir(ctx.cwd):
            os.chdir(ctx.cwd)
        setup_logging(ctx.run, self.role, name)
        self.log = logging.getLogger(f"rushes.{self.role}")
        self.phase, self.since = "starting", time.time()
        self.metrics = RoleMetrics(ctx.run.name, self.role, name)
        self.going = False
        if self.hands_back:
            with contextlib.suppress(ValueError):  # not in the main thread: Ray's own handler ends the process at once
                signal.signal(signal.SIGTERM, self._sigterm)

    def _sigterm(self, number: int, frame: Any) -> None:
        """A pre-empted machine says so with SIGTERM: what is in hand is finished, nothing new is begun."""
        self.log.warning("asked to end (SIGTERM) while %s", self.phase)
        self.going = True
        if self.phase == IDLE:
            sys.exit(0)

    def __repr__(self) -> str:
        return f"{self.ctx.run.name}/{self.name}"

    def info(self) -> dict[str, Any]:
        """Who and where this actor is, and its memory in bytes (now and at its peak)."""
        context = ray.get_runtime_context()
        return {
            "name": self.name,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "node": context.get_node_id(),
            "rss": psutil.Process().memory_info().rss,
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "phase": self.phase,
            "since": self.since,
        }

    @contextlib.contextmanager
    def doing(self, phase: str, group: int | None = None) -> Iterator[None]:
        """Marks what the actor does; an exception is written to run.log with its traceback and goes on."""
        if self.going:
            raise WorkerPreempted("it was asked to end (SIGTERM), and finished what it had in hand")
        self.phase, self.since = phase, time.time()
        started = time.perf_counter()
        try:
            yield
        except Exception:
            self.log.exception("%s failed", phase, extra={"group": "-" if group is None else group})
            raise
        finally:
            self.metrics.phase(phase, time.perf_counter() - started)
            self.phase, self.since = IDLE, time.time()


def to_bytes(value: Any) -> bytes:
    """Small things for a call of an actor, as one bytes object, without references. Ray's own way of sending what is no
    plain number or text costs the caller as much again as the whole call: it makes a pickler for each argument."""
    return pickle.dumps(value, protocol=5)


def from_bytes(data: bytes) -> Any:
    """What `to_bytes` was given. It comes from the controller, through Ray, which unpickles all else that it sends."""
    return pickle.loads(data)


def use_threads(threads: int) -> None:
    """Compute threads of torch in this process."""
    import torch

    torch.set_num_threads(max(1, threads))


def cores() -> int:
    return len(os.sched_getaffinity(0))


# glibc gives large blocks back at every `free`, and each activation on the CPU is then paged in anew. Kept, they are
# used again: a third of the page faults of a quickstart's pass. Other allocators read other names.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def actor_env(threads: int) -> dict[str, str]:
    """Environment of an actor's process. Passive waiting: several processes share the cores, and OpenMP's active
    waiting would make single calls many times slower."""
    env = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", **KEPT_MEMORY}
    if threads:
        env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return env


def merged_env(runtime_env: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """A role's own Ray runtime environment with the variables that every actor gets; its own win."""
    own = dict(runtime_env)
    if "py_executable" in own:
        # Another environment's python would not find this project. Where it is installed among other packages, these
        # would come before the environment's own: then the environment itself must know the folder (main.pth).
        root = "" if PROJECT.name == "site-packages" else str(PROJECT)
        command = str(own["py_executable"])
        if "/" in command:  # relative to where the run was started; Ray would take it from a folder of its own
            own["py_executable"] = os.path.abspath(command)
        given = own.get("env_vars", {}).get("PYTHONPATH", "")
        path = os.pathsep.join(filter(None, (given, root)))
        own["env_vars"] = {**own.get("env_vars", {}), **({"PYTHONPATH": path} if path else {})}
    return {**own, "env_vars": {**actor_env(threads), **own.get("env_vars", {})}}


def ray_resources(resources: Mapping[str, float]) -> dict[str, Any]:
    """A role's `resources` as options of a Ray actor; CPU, GPU and memory (bytes) have options of their own there."""
    own = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {own[name]: amount for name, amount in resources.items() if name in own}
    return {**options, "resources": {name: amount for name, amount in resources.items() if name not in own}}
