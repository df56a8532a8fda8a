"""Base class of the actors: logging, SIGTERM, phase timing, and the facts an actor reports about itself."""

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
from pipeline.core.secrets import mask_streams, register_tree
from pipeline.runs.log import setup_logging

IDLE = "idle"


class RoleActor:
    """Base of the actor classes. `name`, such as `rollout-0`, is also its label in the Ray dashboard."""

    role = "actor"
    drains_on_sigterm = False  # whether it finishes its current call after SIGTERM; else Ray's handler ends it at once

    def __init__(self, ctx: RunContext, name: str) -> None:
        self.ctx, self.cfg, self.name = ctx, ctx.cfg, name
        if os.path.isdir(ctx.cwd):
            os.chdir(ctx.cwd)
        register_tree(ctx.cfg.model_dump(mode="json"))
        mask_streams()
        setup_logging(ctx.run, self.role, name)
        self.log = logging.getLogger(f"rushes.{self.role}")
        self.phase, self.since = "starting", time.time()
        self.metrics = RoleMetrics(ctx.run.name, self.role, name)
        self.draining = False
        if self.drains_on_sigterm:
            with contextlib.suppress(ValueError):  # not in the main thread: Ray's handler stays, and ends it at once
                signal.signal(signal.SIGTERM, self._sigterm)

    def _sigterm(self, number: int, frame: Any) -> None:
        """The machine is about to be taken away: the current call is finished, further ones are refused."""
        self.log.warning("shutting down (SIGTERM) while %s", self.phase)
        self.draining = True
        if self.phase == IDLE:
            sys.exit(0)

    def __repr__(self) -> str:
        return f"{self.ctx.run.name}/{self.name}"

    def info(self) -> dict[str, Any]:
        """Name, process, host and node of the actor, its memory in bytes (now and at its peak), and its phase."""
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
        """Marks and times a phase. An exception is logged with its traceback and raised again. Raises
        `WorkerPreempted` while the actor is shutting down."""
        if self.draining:
            raise WorkerPreempted("it is shutting down (SIGTERM) and takes no further call")
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
    """Sets the compute threads of torch in this process."""
    import torch

    torch.set_num_threads(max(1, threads))
