"""Processes that take one measurement per request: starting one takes longer than what it times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.ray_options import actor_env
from pipeline.core.errors import RushesError

ROOT = Path(__file__).parents[2]


def python(args: list[str], threads: int = 1, **streams: Any) -> subprocess.Popen:
    """Runs a module of this repository; the environment is the same for all that is compared."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **actor_env(threads)}
    return subprocess.Popen([sys.executable, "-m", *args], cwd=ROOT, env=env, text=True, **streams)


class MeasurementServer:
    """A module that reads lines and answers each with a line of JSON (`benchmarks.speed.bare`,
    `pipeline.plain_loop`)."""

    def __init__(self, args: list[str], threads: int = 1) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = python(args, threads, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)

    def __enter__(self) -> MeasurementServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def measure(self) -> dict[str, float]:
        """Raises RushesError when the process has ended, with its last words."""
        return together([self])[0]


def together(processes: Sequence[MeasurementServer]) -> list[dict[str, float]]:
    """Measurements that are taken at the same time. Raises as `MeasurementServer.measure` does."""
    return [_answer(process) for process in [_request(process) for process in processes]]


def _request(server: MeasurementServer) -> MeasurementServer:
    try:
        server._process.stdin.write("\n")  # type: ignore[union-attr]
        server._process.stdin.flush()  # type: ignore[union-attr]
    except BrokenPipeError:
        pass  # its answer is missing, and is explained there
    return server


def _answer(server: MeasurementServer) -> dict[str, float]:
    line = server._process.stdout.readline()  # type: ignore[union-attr]
    if not line:
        server._errors.seek(0)
        raise RushesError(f"bench: {server._process.args!r} failed: {server._errors.read().strip()[-400:]}")
    return json.loads(line)
