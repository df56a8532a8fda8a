"""Calls to the controllers of the runs in a Ray cluster, from where Ray itself is reachable.

A run is found by its controller, the actor `RUN/controller` of the namespace `rushes`. On a node of the cluster the
functions are called directly; from outside, `jobs.cluster.client` submits `python -m jobs.cluster.run_api OPERATION
ARGUMENTS` as a small Ray job and reads its answer, so that one open port, the dashboard's, is enough.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.core.errors import ConfigError, RunFailed, RushesError
from pipeline.core.storage import url_of
from pipeline.runs.paths import RunDir

NAMESPACE = "rushes"
CONTROLLER = "/controller"
_CONTROLLER = re.compile(rf"(.+){CONTROLLER}(?:#(\d+))?")
ANSWER = "RUSHES-ANSWER "  # begins the lines of the output that are answers
ANSWER_S = 60.0  # a controller that starts or saves may take a while to answer
WATCH_S = 2.0


def controller_options(run: RunDir, life: int = 1) -> dict[str, Any]:
    """Ray options of the run's controller; `life`: its number, from 1. The controller of a mirrored run stays on the
    driver's node, whose scratch folder is what is mirrored."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"name": run.name + CONTROLLER + (f"#{life}" if life > 1 else "")}
    if url_of(run.path) is not None:
        here = ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    elif "rushes_controller" in ray.cluster_resources():  # the head announces it: not on a node that may be pre-empted
        options["resources"] = {"rushes_controller": 0.001}
    return options


def controllers(names: Iterable[str]) -> dict[str, str]:
    """Run -> its controller's actor name, the newest one, among the names of living actors."""
    newest: dict[str, tuple[int, str]] = {}
    for name in names:
        if match := _CONTROLLER.fullmatch(name):
            candidate = (int(match.group(2) or 1), name)
            newest[match.group(1)] = max(newest.get(match.group(1), candidate), candidate)
    return {run: name for run, (_, name) in sorted(newest.items())}


def _controller_names() -> dict[str, str]:
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return controllers(actor["name"] for actor in actors if actor["namespace"] == NAMESPACE)


def running() -> list[str]:
    """Names of the runs that are running in this cluster."""
    return list(_controller_names())


def _controller(run: str) -> Any:
    import ray

    names = _controller_names()
    try:
        return ray.get_actor(names[run], namespace=NAMESPACE)
    except (KeyError, ValueError):
        raise unknown_run(run, list(names)) from None


def unknown_run(run: str, running: list[str]) -> ConfigError:
    from pipeline.core.files import did_you_mean

    names = f"running: {', '.join(running)}" if running else "none is running"
    return ConfigError(f"no run {run!r} is running in this cluster ({names}){did_you_mean(run, running)}")


def ask(run: str, method: str, *args: Any) -> Any:
    """What the controller's method returns. Raises `ConfigError` for an unknown run, the controller's own
    `RushesError`, or `RunFailed` when it does not answer."""
    import ray

    from actors.ray_errors import describe, root

    controller = _controller(run)
    try:
        return ray.get(getattr(controller, method).remote(*args), timeout=ANSWER_S)
    except AttributeError:
        raise RunFailed(f"run {run}: its version of Rushes does not know `{method}`; start it with this one") from None
    except ray.exceptions.GetTimeoutError:
        raise RunFailed(f"run {run}: its controller has not answered within {ANSWER_S:g} s; see its log") from None
    except ray.exceptions.RayError as error:
        cause = root(error)
        if isinstance(cause, RushesError):
            raise cause from None
        raise RunFailed(f"run {run}: {describe(error)}") from error


def snapshot(run: str, since: int = -1) -> dict[str, Any]:
    """What `Controller.progress` says; `records` are those of the steps after the first `since` (-n: the last n)."""
    return ask(run, "progress", since)


def overview() -> list[dict[str, Any]]:
    """One row per running run: run, state, step, steps, reward (of the last step, or None)."""
    rows = []
    for run in running():
        try:
            progress = snapshot(run)
        except ConfigError:
            continue  # ended in between
        except RunFailed as error:
            rows.append({"run": run, "state": str(error), "step": None, "steps": None, "reward": None})
            continue
        records = progress["records"]
        reward = records[-1].get("reward/mean") if records else None
        rows.append({"run": run, **{key: progress[key] for key in ("state", "step", "steps")}, "reward": reward})
    return rows


def stop(run: str) -> None:
    """Asks for a checkpoint of the last completed step and the end; returns at once."""
    ask(run, "stop")


def kill(run: str) -> None:
    """Ends the controller at once; its driver ends with an error, and the other actors with them."""
    import ray

    ray.kill(_controller(run), no_restart=True)


def scale(run: str, targets: dict[str, int]) -> Any:
    return ask(run, "scale", targets)


def log(run: str, offset: int = 0) -> dict[str, Any]:
    """run.log from byte `offset` on: {"text": ..., "offset": ...}."""
    return ask(run, "read_log", offset)


def watch(run: str) -> Iterator[dict[str, Any]]:
    """Snapshots with the new steps, every two seconds, until the run ends."""
    seen = 0
    while True:
        try:
            progress = snapshot(run, seen)
        except (ConfigError, RunFailed):
            if seen == 0 and run not in running():
                raise
            return
        yield progress
        seen = progress["recorded"]
        time.sleep(WATCH_S)


def follow_log(run: str) -> Iterator[str]:
    """The text of run.log as it grows, until the run ends."""
    offset = 0
    while True:
        try:
            part = log(run, offset)
        except (ConfigError, RunFailed):
            if offset == 0:
                raise
            return
        offset = part["offset"]
        if part["text"]:
            yield part["text"]
        else:
            time.sleep(WATCH_S)


STREAMS = ("watch", "follow_log")  # these last as long as the run
OPERATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (running, overview, snapshot, stop, kill, scale, log, watch, follow_log)
}


def main(argv: list[str]) -> int:
    """`python -m jobs.cluster.run_api OPERATION JSON`: prints a line `RUSHES-ANSWER {"value": ...}`, several for a
    generator."""
    import ray

    def say(answer: dict[str, Any]) -> None:
        print(ANSWER + json.dumps(answer), flush=True)

    try:
        ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        value = OPERATIONS[argv[0]](**json.loads(argv[1]))
        if isinstance(value, Iterator):
            for one in value:
                say({"value": one})
        else:
            say({"value": value})
    except RushesError as error:
        say({"error": str(error), "kind": type(error).__name__})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
