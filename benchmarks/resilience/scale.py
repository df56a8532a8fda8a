"""A run that is scaled from one rollout worker to four and back to one while it trains.

    python -m benchmarks.resilience.scale [--steps 14] [--report FILE]

The cluster begins with one worker node that has room for two workers; another node joins after four are requested.
Measures seconds from the request to the first group drawn by a new worker, from the node's joining to the first group
drawn on it, and from the request for one worker until the others' processes are gone and no object is left on their
node.
The last line of stdout is one JSON object; the exit code is 0 when the run finished and lost no group.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.resilience.chaos import accounts
from benchmarks.resilience.cluster import NAMESPACE, Nodes, Result, Training, cluster_experiment, image_config, say

LIMIT_S = 900.0


def ask(run: Training, method: str, *args: Any) -> Any:
    import ray

    return ray.get(getattr(ray.get_actor(f"{run.name}/controller", NAMESPACE), method).remote(*args), timeout=60)


def until(run: Training, condition: Callable[[dict[str, Any]], Any], what: str) -> float:
    """Seconds until the controller's snapshot meets `condition`."""
    started = time.monotonic()
    while not condition(ask(run, "progress", 10**9)):
        if not run.running or time.monotonic() - started > 240:
            raise SystemExit(f"never came to pass: {what}\n{run.tail()}")
        time.sleep(0.1)
    seconds = time.monotonic() - started
    say(f"{what}: {seconds:.1f} s (step {run.step})")
    return round(seconds, 1)


def at_work(snapshot: dict[str, Any], names: set[str]) -> bool:
    return any("group" in snapshot["activities"].get(name, "") for name in names)


def stored(node: str) -> float:
    """Bytes in use of a node's object store."""
    from ray._private.state import state

    total = state.total_resources_per_node().get(node, {}).get("object_store_memory", 0.0)
    return total - state.available_resources_per_node().get(node, {}).get("object_store_memory", total)


def run(options: argparse.Namespace, folder: Path) -> Result:
    measured: dict[str, Any] = {}
    with Nodes(workers=1) as nodes:
        rollout = {"workers": 1, "threads": 1, "resources": {"CPU": 1.5, "rushes_rollout": 0.01}}
        config = image_config(folder, options.steps, nodes.address, rollout=rollout, evaluation={"prompts": 24})
        training = Training(config, "scale")
        training.until(lambda: training.step >= 1, LIMIT_S)
        say(f"scale: {ask(training, 'scale', {'rollout': 4})}")
        measured["asked_to_second_worker_at_work_s"] = until(
            training, lambda s: at_work(s, {"rollout-1"}), "a second worker draws groups"
        )
        waiting = ask(training, "progress", 10**9)
        measured["waited_for_a_node"] = sum(
            "waiting for a node" in activity for activity in waiting["activities"].values()
        )
        say("a node joins")
        nodes.nodes.append(nodes.add())
        measured["node_joined_to_its_worker_at_work_s"] = until(
            training, lambda s: at_work(s, {"rollout-2", "rollout-3"}), "a worker on the new node draws groups"
        )
        until(training, lambda s: s["pools"]["rollout"]["ready"] == 4, "four are ready")
        step = training.step
        training.until(lambda: training.step >= step + 2, LIMIT_S)
        measured["takes_per_s_with_four"] = training.metrics()[-1].get("takes_per_s")
        pids = ask(training, "progress", 10**9)["pids"]
        say(f"scale: {ask(training, 'scale', {'rollout': 1})}")
        measured["asked_to_three_gone_s"] = until(
            training, lambda s: sum(name.startswith("rollout-") for name in s["activities"]) == 1, "three have left"
        )
        gone = [name for name in pids if name.startswith("rollout-")]
        measured["rollout_workers_before"] = len(gone)
        started, node = time.monotonic(), nodes.nodes[-1].node_id
        while stored(node) > 0 and time.monotonic() - started < 120 and training.running:
            time.sleep(0.2)
        measured["then_no_object_left_on_the_node_s"] = round(time.monotonic() - started, 1)
        measured["bytes_left_on_the_node"] = stored(node)
        training.wait(LIMIT_S)
    books = accounts(training, 6, options.steps)
    result = {**measured, **{f"groups_{k}": books[k] for k in ("admitted", "trained", "failed", "lost")}}
    return Result(result | {"steps": options.steps}, books["wrong"])


if __name__ == "__main__":
    sys.exit(cluster_experiment(run, __doc__, steps={"type": int, "default": 14}))
