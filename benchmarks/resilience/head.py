"""The head of the cluster dies with everything on it in the middle of a run; a new cluster resumes the run.

    python -m benchmarks.resilience.head [--steps 8] [--report FILE]

What a RayJob's retry does on Kubernetes. The last line of stdout is one JSON object; the exit code is 0 when the
resumed run finished with every step and group exactly once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.resilience.chaos import accounts
from benchmarks.resilience.cluster import Nodes, Result, Training, cluster_experiment, image_config, say

LIMIT_S = 900.0


def run(options: argparse.Namespace, folder: Path) -> Result:
    import ray

    with Nodes(workers=1) as nodes:
        config = image_config(folder, options.steps, nodes.address, evaluation={"prompts": 24})
        first = Training(config, "head")
        first.until(lambda: first.step >= options.steps // 2, LIMIT_S)
        lost_at = first.step
        say(f"the head is killed at step {lost_at}")
        ray.shutdown()  # or Ray would end this process as well
        nodes.cluster.head_node.kill_gcs_server(check_alive=False)
        nodes.cluster.head_node.kill_raylet(check_alive=False)
        started = time.monotonic()
        while first.running and time.monotonic() - started < 180:
            time.sleep(0.2)
        ended_s, code = time.monotonic() - started, first.process.poll()
        say(f"the run's process ended with {code} after {ended_s:.0f} s: {first.tail().splitlines()[-1:]}")
        if code is None:
            first.process.kill()
    say("a new cluster")
    with Nodes(workers=1) as nodes:
        resumed = Training(config, "head", "--resume", f"ray.address={nodes.address}")
        wall = resumed.wait(LIMIT_S)
    books = accounts(resumed, 6, options.steps)
    wrong = books["wrong"] + ([] if code not in (0, None) else [f"the first process ended with {code}"])
    result = {"lost_at_step": lost_at, "exit_code": code, "noticed_s": round(ended_s, 1), "resumed_s": round(wall, 1)}
    result |= {f"groups_{key}": books[key] for key in ("admitted", "trained", "failed", "lost")}
    return Result(result | {"steps": options.steps}, wrong)


if __name__ == "__main__":
    sys.exit(cluster_experiment(run, __doc__, steps={"type": int, "default": 8}))
