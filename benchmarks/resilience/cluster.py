"""What the experiments of this folder share: a Ray cluster of several raylets on this machine, a training run on it in
a separate process, and the command line of an experiment.

Every raylet is a real one with its own object store, so a node that is removed takes its actors and objects with it,
as a machine would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
NAMESPACE = "rushes"
SYSTEM = {  # a lost node is noticed in four seconds, not in thirteen
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 4,
}
STORE = 100 * 2**20  # bytes of object store of each node
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # `ray start` would make a token that this process does not know
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_raylet_start_wait_time_s": "120",  # on a machine that does something else as well
    "TOKENIZERS_PARALLELISM": "false",
}


def say(text: str) -> None:
    """Progress goes to stderr: the last line of stdout is the result."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Result:
    """What an experiment measured, and what went wrong (empty: it passed)."""

    values: dict[str, Any]
    problems: list[str]


def cluster_experiment(
    run: Callable[[argparse.Namespace, Path], Result], description: str | None, **options: dict[str, Any]
) -> int:
    """The command line of an experiment. `run` gets the parsed options and a folder for its runs; `options`: name ->
    arguments of `add_argument`. Prints the result as one JSON line (also into --report) and returns the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, arguments in options.items():
        parser.add_argument(f"--{name}", **arguments)
    parser.add_argument("--report", type=Path, help="also write the result there")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: a temporary folder)")
    parsed = parser.parse_args()
    folder = (parsed.folder or Path(tempfile.mkdtemp(prefix=f"rushes-{Path(sys.argv[0]).stem}-"))).absolute()
    result = run(parsed, folder)
    for problem in result.problems:
        say(f"FAILED: {problem}")
    line = json.dumps(result.values)
    if parsed.report is not None:
        parsed.report.parent.mkdir(parents=True, exist_ok=True)
        parsed.report.write_text(line + "\n")
    print(line, flush=True)
    return 1 if result.problems else 0


class Nodes:
    """A head with the controller (and the learner, unless `learner_on_workers`), and worker nodes for the rest."""

    def __init__(self, workers: int, learner_on_workers: bool = False) -> None:
        os.environ.update(ENVIRONMENT)
        end_properly_on_sigterm()
        import ray
        from ray.cluster_utils import Cluster

        learner = {"rushes_learner": 1000}
        self._worker = {"rushes_rollout": 1000, "rushes_reward": 1000, **(learner if learner_on_workers else {})}
        head = {"rushes_controller": 1000, **({} if learner_on_workers else learner)}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "resources": head,
                "object_store_memory": STORE,
                "include_dashboard": False,
                "_system_config": SYSTEM,
                "temp_dir": tempfile.mkdtemp(prefix="rushes-ray-"),  # else other programs here would join this Ray
            },
        )
        self.nodes = [self.add() for _ in range(workers)]
        ray.init(self.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        end_properly_on_sigterm()  # replaces Ray's handler

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @property
    def metrics(self) -> list[str]:
        """HOST:PORT of each node's Prometheus endpoint."""
        import ray

        return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]

    def add(self) -> Any:
        return self.cluster.add_node(
            num_cpus=4, resources=self._worker, object_store_memory=STORE, include_dashboard=False
        )

    def kill(self, position: int) -> None:
        """As if its machine were switched off."""
        self.cluster.remove_node(self.nodes.pop(position), allow_graceful=False)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()


@dataclass
class Actor:
    name: str  # RUN/rollout-0#2
    pid: int
    node: str

    @property
    def role(self) -> str:
        """rollout, reward, learner or controller."""
        return self.name.split("/", 1)[1].split("-")[0].split(".")[0].split("#")[0]


def actors(run: str) -> list[Actor]:
    """The run's living actors, from Ray's actor table."""
    from ray._private.state import actors as table

    alive = []
    for entry in table().values():
        name, state = entry.get("Name", ""), entry.get("State")
        if name.startswith(f"{run}/") and state == "ALIVE" and entry.get("Pid", 0) > 0:
            alive.append(Actor(name=name, pid=int(entry["Pid"]), node=entry["Address"]["NodeID"]))
    return sorted(alive, key=lambda actor: actor.name)


def end_properly_on_sigterm() -> None:
    """Makes SIGTERM raise SystemExit, so that `finally` blocks end the raylets."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def kill_process(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def image_config(folder: Path, steps: int, address: str, **sections: Any) -> Path:
    """A run on the shipped image generator that learns within few steps; every role tied to nodes that announce it."""
    base: dict[str, Any] = {
        "run": {"dir": str(folder), "steps": steps},
        "generator": {
            "pretrained": str(ROOT / "models/shapes-image"),
            "height": 48,
            "width": 48,
            "call_kwargs": {"max_sequence_length": 12},
        },
        "trainable": {"kind": "full"},
        "prompts": {
            "train": str(ROOT / "configs/prompts/image-train.txt"),
            "heldout": str(ROOT / "configs/prompts/image-heldout.txt"),
        },
        "sampler": {"steps": 8, "timestep_fraction": 0.43},
        "rewards": {"scene": {"scorer": "scene", "resources": {"rushes_reward": 0.01}}},
        "objective": {"name": "awm", "kl_beta": 0.1},
        "step": {"takes": 12, "groups": 6},
        "optimizer": {"lr": 5e-4, "ema_decay": 0.8},
        "rollout": {"workers": 2, "threads": 1, "resources": {"rushes_rollout": 0.01}},
        "learner": {"threads": 1, "resources": {"rushes_learner": 0.01}},
        "evaluation": {"prompts": 96, "steps": 8, "batch": 16},
        "checkpoint": {"every": 2, "keep": 2},
        "faults": {"max_attempts": 8, "max_restarts": 7, "max_failed_groups": 3, "call_timeout_s": 120},
        "tracking": {"backends": []},
        "ray": {"address": address},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(base, sort_keys=False))
    return path


class Training:
    """`rushes train` as a process."""

    def __init__(self, config: Path, name: str, *more: str) -> None:
        self.name, self.started = name, time.monotonic()
        self.folder = config.parent / name
        self.output = config.parent / f"{name}.out"
        with open(self.output, "ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", "train", str(config), f"run.name={name}", *more],
                cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return max([0, *(line["step"] for line in self.metrics() if "loss" in line)])

    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last one may be half-written
                rows.append(json.loads(line))
        return rows

    def until(self, condition: Any, timeout: float) -> None:
        limit = time.monotonic() + timeout
        while not condition():
            if not self.running:
                raise SystemExit(f"{self.name} ended with {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > limit:
                raise SystemExit(f"{self.name}: still at step {self.step} after {timeout:.0f} s:\n{self.tail()}")
            time.sleep(0.2)

    def wait(self, timeout: float) -> float:
        """Seconds it took. Exits with its last lines when it failed or took longer."""
        try:
            code = self.process.wait(max(1.0, timeout - (time.monotonic() - self.started)))
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise SystemExit(f"{self.name}: not done after {timeout:.0f} s:\n{self.tail()}") from None
        if code != 0:
            raise SystemExit(f"{self.name} ended with {code}:\n{self.tail()}")
        return time.monotonic() - self.started

    def tail(self) -> str:
        return "\n".join(self.output.read_text().splitlines()[-15:])

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())
