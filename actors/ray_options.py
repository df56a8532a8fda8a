"""How Ray starts and reaches an actor: the run's context, environment variables, resources, packed arguments."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.runs.paths import RunDir

PROJECT = Path(__file__).resolve().parents[1]
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


def to_bytes(value: Any) -> bytes:
    """Small things for a call of an actor, as one bytes object, without references. Ray's own way of sending what is no
    plain number or text costs the caller as much again as the whole call: it makes a pickler for each argument."""
    return pickle.dumps(value, protocol=5)


def from_bytes(data: bytes) -> Any:
    """What `to_bytes` was given. It comes from the controller, through Ray, which unpickles all else that it sends."""
    return pickle.loads(data)


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
