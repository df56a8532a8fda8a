"""The Ray of a run: joins a cluster or starts a small local one, whose processes end with the run."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

import pipeline
from pipeline.config.resources import ROLE_RESOURCES
from pipeline.config.schema import Config
from pipeline.core.cluster_address import cluster_address, is_listening
from pipeline.core.deadline import within
from pipeline.core.errors import ConfigError, RushesError, one_line
from pipeline.core.files import describe_os_error

NAMESPACE = "rushes"
JOIN_S = 30.0  # for the cluster's head to answer; after 60 s Ray's client would end the whole process
log = logging.getLogger("rushes.driver")
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # no idle workers in advance: every actor gets its own process anyway
    "RAY_enable_worker_prestart": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
}
# For a local Ray without a dashboard: nobody reads these, and without them Ray uses a third less of the cores.
_UNSEEN = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
}


def _messages_to_the_log() -> None:
    """Ray prints cluster messages ("A worker died ...", with tracebacks) to stdout even with `log_to_driver` off, and
    has no switch for it. The run itself reports what matters, in one line."""
    from ray._private import worker

    def to_log(data: dict, ignore_prefix: bool = False) -> None:
        logging.getLogger("rushes.ray").warning("%s", "\n".join(data.get("lines", [])))

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = to_log


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets the variables that are not set yet, within the `with` block."""
    unset = {key: value for key, value in variables.items() if key not in os.environ}
    os.environ.update(unset)
    try:
        yield
    finally:
        for key in unset:
            os.environ.pop(key, None)


@contextlib.contextmanager
def _interpreter(python: Path | None) -> Iterator[None]:
    """Ray starts its workers with the `sys.executable` that it finds."""
    own = sys.executable
    sys.executable = str(python or own)
    try:
        yield
    finally:
        sys.executable = own


def _end_log_monitor() -> None:
    """It looks at all log files ten times a second, for drivers that want their lines, and has no switch."""
    from ray._private import worker

    node: Any = getattr(worker, "_global_node", None)
    if hasattr(node, "kill_log_monitor"):
        node.kill_log_monitor(check_alive=False)


def _keep_our_signals() -> None:
    """`ray.init` replaces the handler of SIGTERM by one that exits on the spot, which loses the run's last steps, and
    during its start-up swallows the signal. The caller's own handler stays in place instead."""
    from ray._private import utils

    if hasattr(utils, "set_sigterm_handler"):
        utils.set_sigterm_handler = lambda handler: None


class RaySession:
    """`with RaySession(cfg) as session:` connects; `session.ours` says whether the Ray was started here.

    `check` is called while it waits for a cluster, and ends the wait by raising. `python`: the interpreter of the
    workers, of a Ray that is started here; None: this process's own.
    """

    def __init__(self, cfg: Config, check: Callable[[], None] = lambda: None, python: Path | None = None) -> None:
        self.cfg, self._check, self._python = cfg, check, python
        self.ours = False
        self._before: set[int] = set()

    def __enter__(self) -> RaySession:
        os.environ.update({key: os.environ.get(key, value) for key, value in _QUIET.items()})
        if (Path(pipeline.__file__).parents[1] / "pyproject.toml").exists():  # run from a checkout: workers need it too
            given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
            paths = [Path(pipeline.__file__).parents[1], *(Path(path).absolute() for path in given)]
            os.environ["PYTHONPATH"] = os.pathsep.join(map(str, paths))  # Ray's workers start in other folders
        import ray

        _messages_to_the_log()
        _keep_our_signals()
        address = cluster_address(self.cfg.ray.address)
        common = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
        if address is not None:
            self._join(address, common)
            return self
        unseen = self.cfg.ray.dashboard_port is None
        self._before = {child.pid for child in psutil.Process().children(recursive=True)}
        self.ours = True
        try:
            with _environment(_UNSEEN if unseen else {}), _interpreter(self._python):
                ray.init(
                    **{
                        "include_dashboard": not unseen,
                        "dashboard_host": "127.0.0.1",
                        **self.cfg.ray.init,
                        "address": "local",
                        "object_store_memory": self.cfg.ray.object_store_memory,
                        # this machine plays all roles
                        "resources": {
                            **{name: 1000.0 for name in ROLE_RESOURCES},
                            **self.cfg.ray.init.get("resources", {}),
                        },
                        **common,
                    }
                )
        except (KeyboardInterrupt, SystemExit):
            self.close()
            raise
        except OSError as error:
            self.close()
            raise RushesError(f"Ray could not start: {describe_os_error(error)}") from error
        except Exception as error:  # Ray raises the base class for a node that does not come up in time
            self.close()
            raise RushesError(f"Ray could not start: {one_line(error, 300)}") from error
        if unseen:
            _end_log_monitor()
        return self

    def _join(self, address: str, options: dict[str, Any]) -> None:
        """Connects to a running cluster. Raises `ConfigError` within seconds where nothing listens, and after `JOIN_S`
        where something does not answer: Ray itself tries for minutes, and no signal is handled meanwhile."""
        import ray

        problem = "nothing listens there"
        try:
            if address == "auto" or within(JOIN_S, lambda: _answers(address), f"Ray at {address}", log, self._check):
                ray.init(address=address, **options)
                return
        except (TimeoutError, ConnectionError, ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
            problem = one_line(error)
        raise ConfigError(
            f"ray.address: no Ray answers at {address} ({problem}); start it, correct ray.address or RAY_ADDRESS, or "
            "set ray.address=local"
        )

    def __exit__(self, *_: object) -> None:
        self.close()

    def children(self) -> list[psutil.Process]:
        """Live processes below this one that were not there before Ray was started."""
        return [child for child in psutil.Process().children(recursive=True) if child.pid not in self._before]

    def close(self) -> None:
        """Disconnects; of a Ray that was started here, no process is left."""
        import ray

        family = self.children() if self.ours else []
        with contextlib.suppress(Exception):  # whatever state Ray is in, its processes end below
            ray.shutdown()
        _end(family)

    def kill(self) -> None:
        """At once, without asking Ray."""
        if self.ours:
            for process in self.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def _answers(address: str) -> bool:
    """False: nothing listens at the address. Waits for the head's answer where it is a head's own address."""
    if not is_listening(address):
        return False
    if "://" not in address:
        from ray import _raylet

        gcs: Any = _raylet
        gcs.GcsClient(address=address).internal_kv_get(b"rushes", b"rushes")
    return True


def _end(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=3)


class MemorySampler(threading.Thread):
    """Highest sum of resident memory of this process and all below it. Shared pages count once per process."""

    def __init__(self, interval_s: float = 1.0) -> None:
        super().__init__(name="memory", daemon=True)
        self.peak = 0
        self._interval, self._done = interval_s, threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self._done.wait(self._interval):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    total += process.memory_info().rss
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        self._done.set()
        return self.peak
