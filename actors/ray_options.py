"""How actors are started and called: the run's context, environment variables, resources, serialised arguments."""

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
    """The run that an actor belongs to."""

    cfg: Config
    run_path: str  # absolute
    cwd: str  # the driver's working directory; relative paths of the config mean this one

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.run_path))


def to_bytes(value: Any) -> bytes:
    """Pickles small arguments of an actor call, which hold no references. Ray makes a pickler for each argument that is
    no plain number, text or bytes, which costs the caller as much again as the whole call."""
    return pickle.dumps(value, protocol=5)


def from_bytes(data: bytes) -> Any:
    """The inverse of `to_bytes`. The data comes from the controller, through Ray, which unpickles all it sends."""
    return pickle.loads(data)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


# glibc returns large blocks to the system at every `free`, so that each activation on the CPU is paged in anew. Kept,
# they are used again, with a third of the page faults in a quickstart. Other allocators ignore these variables.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def actor_env(threads: int) -> dict[str, str]:
    """Environment of an actor's process. Several processes share the cores, where OpenMP's active waiting would make
    single calls many times slower."""
    env = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", **KEPT_MEMORY}
    if threads:
        env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return env


def merged_env(runtime_env: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """A role's Ray runtime environment with the variables of `actor_env` added, unless it sets them itself."""
    env = dict(runtime_env)
    if "py_executable" in env:
        # Another environment's python would not find this project. But where it is installed among other packages,
        # those would come before the environment's: then the environment must know the folder itself (main.pth).
        root = "" if PROJECT.name == "site-packages" else str(PROJECT)
        command = str(env["py_executable"])
        if "/" in command:  # relative to where the run was started; Ray would resolve it in another folder
            env["py_executable"] = os.path.abspath(command)
        configured = env.get("env_vars", {}).get("PYTHONPATH", "")
        path = os.pathsep.join(filter(None, (configured, root)))
        env["env_vars"] = {**env.get("env_vars", {}), **({"PYTHONPATH": path} if path else {})}
    return {**env, "env_vars": {**actor_env(threads), **env.get("env_vars", {})}}


def ray_resources(resources: Mapping[str, float]) -> dict[str, Any]:
    """A role's `resources` as options of a Ray actor, which has separate ones for CPU, GPU and memory (bytes)."""
    separate = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {separate[name]: amount for name, amount in resources.items() if name in separate}
    return {**options, "resources": {name: amount for name, amount in resources.items() if name not in separate}}
