"""What every role actor shares: its log, its threads, and what it says about itself."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import ray

from actors.prometheus import RoleMetrics
from actors.ray_errors import WorkerPreempted
from actors.ray_options import RunContext
from pipeline.runs.log import setup_logging

IDLE = "idle"


class RoleActor:
    """Base of the actor classes. `name` is e.g. `rollout-0`; it is also the label in the Ray dashboard."""

    role = "actor"
    hands_back = False  # whether SIGTERM lets it finish the group in hand; else Ray's handler ends it at once

    def __init__(self, ctx: RunContext, name: str) -> None:
        self.ctx, self.cfg, self.name = ctx, ctx.cfg, name
        if os.path.isdir(ctx.cwd):
            os.chdir(ctx.cwd)
        setup_logging(ctx.run, self.role, name)
        self.log = logging.getLogger(f"rushes.{self.role}")
        self.phase, self.since = "starting", time.time()
        self.metrics = RoleMetrics(ctx.run.name, self.role, name)
        self.going = False
        if self.hands_back:
            with contextlib.suppress(ValueError):  # not in the main thread: Ray's own handler ends the process at once
                signal.signal(signal.SIGTERM, self._sigterm)

    def _sigterm(self, number: int, frame: Any) -> None:
        """A pre-empted machine says so with SIGTERM: what is in hand is finished, nothing new is begun."""
        self.log.warning("asked to end (SIGTERM) while %s", self.phase)
        self.going = True
        if self.phase == IDLE:
            sys.exit(0)

    def __repr__(self) -> str:
        return f"{self.ctx.run.name}/{self.name}"

    def info(self) -> dict[str, Any]:
        """Who and where this actor is, and its memory in bytes (now and at its peak)."""
        context = ray.get_runtime_context()
        return {
            "name": self.name,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "node": context.get_node_id(),
            "rss": psutil.Process().memory_info().rss,
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "phase": self.phase,
            "since": self.since,
        }

    @contextlib.contextmanager
    def doing(self, phase: str, group: int | None = None) -> Iterator[None]:
        """Marks what the actor does; an exception is written to run.log with its traceback and goes on."""
        if self.going:
            raise WorkerPreempted("it was asked to end (SIGTERM), and finished what it had in hand")
        self.phase, self.since = phase, time.time()
        started = time.perf_counter()
        try:
            yield
        except Exception:
            self.log.exception("%s failed", phase, extra={"group": "-" if group is None else group})
            raise
        finally:
            self.metrics.phase(phase, time.perf_counter() - started)
            self.phase, self.since = IDLE, time.time()


def use_threads(threads: int) -> None:
    """Compute threads of torch in this process."""
    import torch

    torch.set_num_threads(max(1, threads))
