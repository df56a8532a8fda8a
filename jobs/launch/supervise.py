"""Supervises the controller: shows its progress, passes signals on, and starts a new one when it dies."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from jobs.cluster.run_api import controller_options, running
from jobs.common.progress import View, make_view
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, RunFailed, RushesError
from pipeline.runs import checkpoint
from pipeline.runs.paths import RunDir
from pipeline.runs.snapshot import RunSnapshot

POLL_S = 0.5
ANSWER_S = 10.0  # for one question to the controller
SILENT_S = 300.0  # seconds without an answer after which a controller counts as dead
START_S = 1800.0  # for a node on which a controller can start
GONE_S = 60.0  # seconds after which the remaining actors of a dead controller are killed
log = logging.getLogger("rushes.driver")


class StopRequest(Protocol):
    stop_requested: bool


def supervise(
    cfg: Config, run: RunDir, resume_from: Path | None, signals: StopRequest, console: Console, debug: bool
) -> dict[str, Any]:
    """The run's result. A controller that dies (its process or node, not an error
    that it reports) is followed by another from the last checkpoint, until more than `faults.max_restarts` have died
    without a new step. Raises what ended the run."""
    import ray

    from actors.ray_errors import describe, root

    if run.name in running():
        raise ConfigError(
            f"run.name: a run {run.name!r} is already running in this cluster; watch it with rushes watch {run.name}, "
            "or use another run.name"
        )
    view = make_view(console, run.name)
    furthest, deaths, life = -1, 0, 0
    try:
        while True:
            life += 1
            watch = _Watch(cfg, run, resume_from, life)
            try:
                result = watch.until_the_end(view, signals)
                if result["status"] == "stopped" and not signals.stop_requested:  # by `rushes stop`
                    stop_own_job()
                return result
            except ray.exceptions.RayError as error:
                if debug and not _is_death(error):
                    raise
                cause = root(error)
                if isinstance(cause, RushesError):
                    raise cause from None
                problem = f"controller on {watch.host}: {describe(error)}"
                if not _is_death(error):
                    raise RunFailed(f"{problem} (see {run.log})") from error
            finally:
                watch.end()
            if watch.step > furthest:
                furthest, deaths = watch.step, 0
            deaths += 1
            if deaths > cfg.faults.max_restarts:
                raise RunFailed(
                    f"{problem} ({deaths} times without getting beyond step {max(furthest, 0)}; faults.max_restarts: "
                    f"{cfg.faults.max_restarts}; see {run.log}); continue with --resume"
                )
            _wait_until_gone(run.name)
            checkpoint.remove_partial(run.path)
            resume_from = checkpoint.latest(run.checkpoints, writing=True)
            step = checkpoint.step_of(resume_from) if resume_from is not None else 0
            if signals.stop_requested:  # it died before it could save: what counts is the last checkpoint
                return {"status": "stopped", "step": step, "checkpoint": str(resume_from) if resume_from else None}
            log.warning("%s; a new controller continues at step %d (death %d)", problem, step, deaths)
            view.note(f"{problem}; continuing at step {step}")
    finally:
        view.close()


def _is_death(error: Exception) -> bool:
    """Whether the controller itself died; an exception it raises may be about another actor's death."""
    from ray import exceptions as rx

    gone = rx.RayActorError | rx.WorkerCrashedError | rx.NodeDiedError | rx.OutOfMemoryError
    return isinstance(error, gone) and not isinstance(error, rx.RayTaskError)


class _Watch:
    """One controller, watched."""

    def __init__(self, cfg: Config, run: RunDir, resume_from: Path | None, life: int) -> None:
        import ray

        from actors.controller import Controller
        from actors.ray_options import RunContext, actor_env

        ctx = RunContext(cfg=cfg, run_path=str(run.path.absolute()), cwd=os.getcwd())
        self.host, self.step = os.uname().nodename, -1  # the driver's host until the controller reports its host
        self._answered = self._told = False
        self.controller: Any = (
            ray.remote(Controller)
            .options(num_cpus=0, runtime_env={"env_vars": actor_env(1)}, **controller_options(run, life))
            .remote(ctx, str(resume_from.absolute()) if resume_from else None)
        )

    def until_the_end(self, view: View, signals: StopRequest) -> dict[str, Any]:
        """The controller's result. Raises its exception, or Ray's if it is gone."""
        import ray

        ended = self.controller.run.remote()
        seen, stopping, answered = 0, False, time.monotonic()
        while True:
            ready, _ = ray.wait([ended], timeout=POLL_S)
            if signals.stop_requested and not stopping:
                stopping = True
                view.note("stopping: saving the last completed step (Ctrl-C again stops at once)")
                self.controller.stop.remote()
            try:
                snapshot = RunSnapshot.from_dict(ray.get(self.controller.progress.remote(seen), timeout=ANSWER_S))
            except ray.exceptions.GetTimeoutError:
                self._silent(time.monotonic() - answered, view, signals)
                continue
            except ray.exceptions.RayError:
                return ray.get(ended)  # the controller is gone: this raises why
            answered, self._answered, self._told = time.monotonic(), True, False
            seen = snapshot.recorded
            self.host, self.step = snapshot.host or self.host, max(self.step, snapshot.step)
            view.update(snapshot)
            if ready:
                return ray.get(ended)

    def _silent(self, seconds: float, view: View, signals: StopRequest) -> None:
        """Says so after 30 s. Raises `ActorUnavailableError` after `SILENT_S`: the process is stopped, or its node
        hangs. One that has not begun yet waits for a node, which may take longer; not when the run is to stop."""
        from ray.exceptions import ActorUnavailableError

        limit = SILENT_S if self._answered else START_S
        if signals.stop_requested:
            limit = min(limit, SILENT_S / 2)
        state = "does not answer" if self._answered else "has not started"
        if seconds >= 30 and not self._told:
            self._told = True
            log.warning("the controller on %s %s for %.0f s; giving up after %.0f s", self.host, state, seconds, limit)
            view.note(f"waiting for the controller on {self.host}, which {state} (giving up after {limit:.0f} s)")
        if seconds >= limit:
            raise ActorUnavailableError(f"it {state} for {seconds:.0f} s", None)

    def end(self) -> None:
        import ray

        ray.kill(self.controller)


def _wait_until_gone(run: str) -> None:
    """Returns once no actor of the run is left: two controllers' actors would share its files and the machine. What was
    reserved for the dead controller's learner is given back, which Ray would do only when the whole job ends: on a
    cluster with just enough GPUs the next learner would wait for room that its predecessor holds."""
    import ray
    from ray.util import get_placement_group, placement_group_table, remove_placement_group

    for room in placement_group_table().values():
        if room["name"].startswith(f"{run}/") and room["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # it has just gone
                remove_placement_group(get_placement_group(room["name"]))
    started = time.monotonic()
    while names := [name for name in ray.util.list_named_actors() if name.startswith(f"{run}/")]:
        if time.monotonic() - started > GONE_S:
            raise RunFailed(f"actors of a dead controller do not end: {', '.join(names)}; continue with --resume")
        for name in names:
            try:
                ray.kill(ray.get_actor(name))
            except ValueError:
                continue  # it has just ended
        time.sleep(0.2)


def stop_own_job() -> None:
    """Marks the Ray job that this process is, if it is one, as stopped: with the exit code alone Ray would call it
    failed, and what retries failed jobs (a RayJob) would start it again."""
    import ray
    from ray.job_submission import JobSubmissionClient

    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata") or {}
    if job := metadata.get("job_submission_id"):
        try:
            JobSubmissionClient(ray.get_runtime_context().gcs_address).stop_job(job)
        except (RuntimeError, ConnectionError, ValueError, OSError) as error:
            logging.getLogger("rushes.driver").warning("the job could not be marked as stopped: %s", error)
