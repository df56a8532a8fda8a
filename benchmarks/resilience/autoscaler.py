"""A run on a cluster that has no worker node: Ray's autoscaler adds them, and takes one back when a pool shrinks.

    python -m benchmarks.resilience.autoscaler [--steps 12] [--report FILE]

With Ray's fake node provider: its nodes are real raylets on this machine. Each has room for one rollout worker.
The run asks for two (0 -> 2 nodes), is then scaled to one (the drained worker's node must become idle and go: 2 -> 1),
and ends (1 -> 0). The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.resilience.chaos import accounts
from benchmarks.resilience.cluster import (
    ENVIRONMENT,
    NAMESPACE,
    STORE,
    Result,
    Training,
    cluster_experiment,
    end_properly_on_sigterm,
    image_config,
    say,
)

LIMIT_S = 900.0
HEAD = {"CPU": 2, "rushes_controller": 1000, "rushes_learner": 1000, "rushes_reward": 1000}
ROLLOUT = {"CPU": 1, "rushes_rollout": 1000, "object_store_memory": STORE}
PROVIDER: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 2,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.1,
    "provider": {
        "type": "fake_multinode",
        "disable_launch_config_check": True,
        "disable_node_updaters": True,
        "use_node_id_as_ip": True,  # all its nodes have the same one, by which Ray would tell them apart
    },
    "auth": {},
    "docker": {},
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": HEAD, "node_config": {}, "max_workers": 0},
        "rollout": {"resources": ROLLOUT, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
}


class AutoscaledCluster:
    """`ray start --head` with the fake provider; ends only its own processes."""

    def __init__(self, folder: Path) -> None:
        os.environ.update(ENVIRONMENT)
        import ray
        from ray._private.services import get_node_ip_address

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        self.address = f"{get_node_ip_address()}:{port}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "autoscaler.yaml"
        path.write_text(json.dumps({**PROVIDER, "provider": {**PROVIDER["provider"], "gcs_address": self.address}}))
        resources = json.dumps({name: amount for name, amount in HEAD.items() if name != "CPU"})
        self._process = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}",
                f"--num-cpus={HEAD['CPU']}", f"--resources={resources}", f"--object-store-memory={STORE}",
                "--include-dashboard=false", f"--autoscaling-config={path}",
                f"--temp-dir={tempfile.mkdtemp(prefix='rushes-ray-')}",  # else other programs here would join this Ray
            ],
            env={
                **os.environ,
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "f" * 51 + "00000",  # as the provider calls the head
            },
            stdout=open(folder / "ray.out", "wb"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        limit = time.monotonic() + 90
        while True:
            try:
                ray.init(self.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
                end_properly_on_sigterm()  # replaces Ray's handler
                return
            except ConnectionError:
                if time.monotonic() > limit:
                    self.close()
                    raise
                time.sleep(1)

    def workers(self) -> int:
        import ray

        return sum(node["Alive"] and "rushes_rollout" in node["Resources"] for node in ray.nodes())

    def close(self) -> None:
        import psutil
        import ray

        ray.shutdown()
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()
        self._process.kill()


def run(options: argparse.Namespace, folder: Path) -> Result:
    cluster = AutoscaledCluster(folder)
    measured: dict[str, Any] = {"nodes_at_first": cluster.workers()}

    def until(condition: Callable[[], bool], event: str, limit: float = 240) -> float:
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > limit:
                raise SystemExit(f"did not happen: {event}; {cluster.workers()} worker nodes\n{training.tail()}")
            time.sleep(0.2)
        seconds = round(time.monotonic() - started, 1)
        say(f"{event}: {seconds} s (step {training.step})")
        return seconds

    try:
        rollout = {"workers": 2, "threads": 1, "resources": {"CPU": 1, "rushes_rollout": 0.01}}
        sections = {"evaluation": {"prompts": 24}, "rollout": rollout}
        training = Training(image_config(folder, options.steps, cluster.address, **sections), "autoscaled")
        measured["start_to_two_nodes_s"] = until(lambda: cluster.workers() == 2, "two nodes")
        until(lambda: training.step >= 2, "two steps")
        import ray

        controller = ray.get_actor("autoscaled/controller", NAMESPACE)
        say(str(ray.get(controller.scale.remote({"rollout": 1}))))
        measured["scaled_down_to_one_node_s"] = until(lambda: cluster.workers() == 1, "one node less")
        measured["at_step"] = training.step
        training.wait(LIMIT_S)
        measured["ended_to_no_node_s"] = until(lambda: cluster.workers() == 0, "no node")
    finally:
        cluster.close()
    books = accounts(training, 6, options.steps)
    return Result({**measured, "groups_trained": books["trained"], "groups_lost": books["lost"]}, books["wrong"])


if __name__ == "__main__":
    sys.exit(cluster_experiment(run, __doc__, steps={"type": int, "default": 12}))
