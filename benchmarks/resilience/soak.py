"""A long run, watched for memory that grows: the object store of every node and the resident memory of every actor.

    python -m benchmarks.resilience.soak --minutes 20 [--report FILE]

Samples every five seconds. The first quarter is warm-up; over the rest a straight line is fitted to each actor's memory
(per process: its replacement gets another line) and to the object stores. An actor's resident memory counts what it has
mapped of its node's object store; "its own" is what remains without shared pages. Flat means that a line rises by less
than 10 % or 20 MiB over that time, whichever is more. The last line of stdout is one JSON object; the exit code is 0
when all are flat and the run still trained at the end.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.resilience.cluster import Nodes, Result, Training, actors, cluster_experiment, image_config, say

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


def run(options: argparse.Namespace, folder: Path) -> Result:
    memory: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with Nodes(workers=1) as nodes:
        sections: dict[str, Any] = {"evaluation": {"prompts": 24, "every": 10}, "tracking": {"save_takes_every": 5}}
        training = Training(image_config(folder, 100_000, nodes.address, **sections), "soak")
        say(f"metrics at {', '.join(nodes.metrics)}")
        training.until(lambda: training.step >= 1, 600)
        began = time.monotonic()
        first, warm, last_report = training.step, began + 15 * options.minutes, began
        while training.running and time.monotonic() < began + 60 * options.minutes:
            time.sleep(SAMPLE_S)
            now = time.monotonic()
            if now - last_report > 60:
                last_report = now
                say(f"step {training.step}; object stores {stores() / MIB:.0f} MiB")
            if now < warm:
                continue
            memory["object stores"].append((now, stores()))
            for actor in actors(training.name):
                try:
                    usage = psutil.Process(actor.pid).memory_info()
                except psutil.NoSuchProcess:
                    continue
                memory[f"{actor.name} ({actor.pid})"].append((now, usage.rss))
                memory[f"{actor.name} ({actor.pid}), its own"].append((now, usage.rss - usage.shared))
        alive, steps = training.running, training.step - first
        say(f"{steps} steps in {options.minutes:g} min; stopping")
        training.process.send_signal(signal.SIGINT)
        training.process.wait(180)
    lines = {name: growth(samples) for name, samples in sorted(memory.items()) if len(samples) > 5}
    wrong = [f"{name} grows: {line}" for name, line in lines.items() if not is_flat(line)]
    if not alive:
        wrong.append(f"the run ended early:\n{training.tail()}")
    return Result({"minutes": options.minutes, "steps": steps, "flat": not wrong, "memory": lines}, wrong)


if __name__ == "__main__":
    sys.exit(cluster_experiment(run, __doc__, minutes={"type": float, "default": 20.0}))
