"""A long run, watched for memory that grows: the object store of every node and the resident memory of every actor.

    python -m benchmarks.resilience.soak --minutes 20 [--report FILE]

Samples every five seconds. The first quarter is warm-up; over the rest a straight line is fitted to each actor's memory
(of one process: a replaced one begins anew) and to the object stores. An actor's resident memory counts what it has
mapped of its node's object store; its own is what remains without shared pages. Flat means that a line rises by less
than 10 % or 20 MiB over that time, whichever is more. The last line of stdout is one JSON object; the exit code is 0
when all are flat and the run still trained at the end.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.resilience.cluster import Nodes, Training, actors, conclude, image_config, say

SAMPLE_S = 5.0
MIB = 2**20


def stores() -> float:
    """Bytes in use in all object stores."""
    import ray

    total = ray.cluster_resources().get("object_store_memory", 0.0)
    return total - ray.available_resources().get("object_store_memory", 0.0)


def growth(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Of (seconds, bytes): MiB at the beginning and end of a fitted line, and its highest sample."""
    times, values = np.array(samples).T
    slope, start = np.polyfit(times - times[0], values, 1)
    end = start + slope * (times[-1] - times[0])
    return {
        "from_mib": round(start / MIB, 1),
        "to_mib": round(end / MIB, 1),
        "peak_mib": round(values.max() / MIB, 1),
        "seconds": round(times[-1] - times[0]),
    }


def is_flat(line: dict[str, float]) -> bool:
    return line["to_mib"] - line["from_mib"] <= max(20.0, 0.1 * line["from_mib"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rushes-soak-"))
    nodes = Nodes(workers=1)
    memory: dict[str, list[tuple[float, float]]] = defaultdict(list)
    try:
        more: dict[str, Any] = {"evaluation": {"prompts": 24, "every": 10}, "tracking": {"save_takes_every": 5}}
        run = Training(image_config(folder, 100_000, nodes.address, **more), "soak")
        say(f"metrics at {', '.join(nodes.metrics)}")
        run.until(lambda: run.step >= 1, 600)
        began = time.monotonic()
        first, warm, said = run.step, began + 15 * options.minutes, began
        while run.running and time.monotonic() < began + 60 * options.minutes:
            time.sleep(SAMPLE_S)
            now = time.monotonic()
            if now - said > 60:
                said = now
                say(f"step {run.step}; object stores {stores() / MIB:.0f} MiB")
            if now < warm:
                continue
            memory["object stores"].append((now, stores()))
            for actor in actors(run.name):
                try:
                    found = psutil.Process(actor.pid).memory_info()
                except psutil.NoSuchProcess:
                    continue
                memory[f"{actor.name} ({actor.pid})"].append((now, found.rss))
                memory[f"{actor.name} ({actor.pid}), its own"].append((now, found.rss - found.shared))
        alive, steps = run.running, run.step - first
        say(f"{steps} steps in {options.minutes:g} min; stopping")
        run.process.send_signal(signal.SIGINT)
        run.process.wait(180)
    finally:
        nodes.close()
    lines = {name: growth(samples) for name, samples in sorted(memory.items()) if len(samples) > 5}
    wrong = [f"{name} grows: {line}" for name, line in lines.items() if not is_flat(line)]
    if not alive:
        wrong.append(f"the run ended early:\n{run.tail()}")
    return conclude(
        {"minutes": options.minutes, "steps": steps, "flat": not wrong, "memory": lines}, wrong, options.report
    )


if __name__ == "__main__":
    sys.exit(main())
