"""Metrics in Ray's own Prometheus endpoint (`ray_rushes_...`), labelled by run, role and worker."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping

import psutil
from ray.util.metrics import Counter, Gauge

from pipeline.core.errors import one_line

# Ray drops a gauge that has not been set for about two minutes from its endpoint; a step may take longer than that.
REFRESH_S = 10.0
log = logging.getLogger("rushes.metrics")
_warned = False


def metric_name(name: str) -> str:
    """`reward/mean` -> `rushes_reward_mean`."""
    return "rushes_" + re.sub(r"[^a-zA-Z0-9_]+", "_", name).strip("_")


def tried(function: Callable[[], None]) -> None:
    """Calls `function`; the first failure of a process is a warning. Nothing of a run depends on its metrics."""
    global _warned
    try:
        function()
    except Exception as error:
        if not _warned:
            log.warning("Prometheus metrics failed: %s: %s; the run continues", type(error).__name__, one_line(error))
        _warned = True


def call_regularly(function: Callable[[], None]) -> threading.Thread:
    """Calls `function` every `REFRESH_S` seconds in a daemon thread."""

    def loop() -> None:
        while True:
            time.sleep(REFRESH_S)
            tried(function)

    thread = threading.Thread(target=loop, name="metrics", daemon=True)
    thread.start()
    return thread


class RoleMetrics:
    """Metrics of a role actor: its memory, the seconds spent per phase, and the takes that it has drawn or scored."""

    def __init__(self, run: str, role: str, worker: str) -> None:
        tags = {"run": run, "role": role, "worker": worker}
        self._rss = Gauge("rushes_rss_bytes", "Resident memory of the actor.", tuple(tags))
        self._rss.set_default_tags(tags)
        self._seconds = Counter("rushes_phase_seconds", "Seconds spent, by phase.", (*tags, "phase"))
        self._seconds.set_default_tags(tags)
        self._takes = Counter("rushes_takes", "Takes drawn (rollout) or scored (reward).", tuple(tags))
        self._takes.set_default_tags(tags)
        self._gpu = Gauge("rushes_gpu_bytes", "Most GPU memory that torch has allocated, within seconds.", tuple(tags))
        self._gpu.set_default_tags(tags)
        self._process = psutil.Process()
        tried(self._memory)
        call_regularly(self._memory)

    def phase(self, phase: str, seconds: float) -> None:
        tried(lambda: self._seconds.inc(max(seconds, 1e-9), {"phase": phase.split(" ")[0]}))

    def takes(self, count: int) -> None:
        tried(lambda: self._takes.inc(count))

    def _memory(self) -> None:
        self._rss.set(self._process.memory_info().rss)
        torch = sys.modules.get("torch")  # not imported for this: a light scorer does without
        cuda = getattr(torch, "cuda", None)  # None while another thread is importing it
        if cuda is not None and cuda.is_available() and cuda.is_initialized():
            self._gpu.set(cuda.max_memory_allocated())
            cuda.reset_peak_memory_stats()


class RunMetrics:
    """Metrics of the controller: those of steps and evaluations, queues, and counts of groups and retries."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges: dict[str, tuple[Gauge, float]] = {}
        call_regularly(self._set_again)

    def set(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name in self._gauges:
                gauge, _ = self._gauges[name]
            else:
                gauge = Gauge(metric_name(name), f"Rushes: {name}.", ("run",))
                gauge.set_default_tags(self._tags)
            gauge.set(float(value))
            self._gauges[name] = (gauge, float(value))

    def _set_again(self) -> None:
        for gauge, value in list(self._gauges.values()):
            gauge.set(value)
