"""Metrics in Ray's own Prometheus endpoint (`ray_rushes_...`), labelled by run, role and worker."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping

import psutil
from ray.util.metrics import Counter, Gauge

_INTERVAL_S = 1.0  # a gauge is read every few seconds; setting it more often only costs


def metric_name(name: str) -> str:
    """`reward/mean` -> `rushes_reward_mean`."""
    return "rushes_" + re.sub(r"[^a-zA-Z0-9_]+", "_", name).strip("_")


class RoleMetrics:
    """Inside a role actor: its memory, the seconds spent per phase, and the takes that it has drawn or scored."""

    def __init__(self, run: str, role: str, worker: str) -> None:
        tags = {"run": run, "role": role, "worker": worker}
        self._rss = Gauge("rushes_rss_bytes", "Resident memory of the actor.", tuple(tags))
        self._rss.set_default_tags(tags)
        self._seconds = Counter("rushes_phase_seconds", "Seconds spent, by phase.", (*tags, "phase"))
        self._seconds.set_default_tags(tags)
        self._takes = Counter("rushes_takes", "Takes drawn (rollout) or scored (reward).", tuple(tags))
        self._takes.set_default_tags(tags)
        self._gpu = Gauge("rushes_gpu_bytes", "GPU memory that torch had allocated, at most.", tuple(tags))
        self._gpu.set_default_tags(tags)
        self._process = psutil.Process()
        self._last = 0.0

    def phase(self, phase: str, seconds: float) -> None:
        self._seconds.inc(max(seconds, 1e-9), {"phase": phase.split(" ")[0]})
        if time.monotonic() - self._last > _INTERVAL_S:
            self._last = time.monotonic()
            self._rss.set(self._process.memory_info().rss)
            torch = sys.modules.get("torch")  # not imported for this: a light scorer does without
            if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
                self._gpu.set(torch.cuda.max_memory_allocated())
                torch.cuda.reset_peak_memory_stats()

    def takes(self, count: int) -> None:
        self._takes.inc(count)


class RunMetrics:
    """Inside the controller: whatever a step or an evaluation reports, queues, and counts of groups and retries."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            gauge = self._gauges.get(name)
            if gauge is None:
                gauge = self._gauges[name] = Gauge(metric_name(name), f"Rushes: {name}.", ("run",))
                gauge.set_default_tags(self._tags)
            gauge.set(float(value))
