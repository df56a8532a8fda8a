"""Client of a Ray cluster: directly on its nodes, or from anywhere through the dashboard's port (Ray Jobs API).

Token authentication works in both: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN are read by Ray itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any, cast

from jobs.cluster import run_api
from pipeline.core import errors
from pipeline.core.cluster_address import cluster_address, is_listening
from pipeline.core.errors import ConfigError, RunFailed, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RUN_KEY = "rushes_run"  # metadata of a run's job
CALL_KEY = "rushes_call"  # metadata of the small jobs that are calls of `run_api`
POLL_S = 0.5
END_S = 30.0  # for the job of a call to end
SETTLE_S = 2.5  # Ray's monitor looks at a job every second
LEFT_BEHIND_S = 60.0  # since the end of a call's job, after which nobody reads it any more
_CALL_ID = re.compile(r"rushes-[a-z_]+-[0-9a-f]{12}")
TERMINAL = ("STOPPED", "SUCCEEDED", "FAILED")
_NEED = "give --address http://HOST:8265 (the dashboard), or HOST:6379 on a machine of the cluster"


def find_address(option: str | None) -> str | None:
    """The address of --address, RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or of the cluster of this machine."""
    address = cluster_address(option, os.environ.get("RAY_API_SERVER_ADDRESS"))
    return None if address == "auto" else address  # only a driver can leave the search to Ray


def reachable(address: str | None) -> str:
    """`address`, if something listens there. Raises `ConfigError`."""
    if address is None:
        raise ConfigError(f"no Ray cluster was found (--address, RAY_ADDRESS, or ray start on this machine); {_NEED}")
    try:
        listening = is_listening(address)
    except ValueError:
        raise ConfigError(f"--address {address}: is not HOST:PORT or http://HOST:PORT; {_NEED}") from None
    if not listening:
        raise ConfigError(f"no Ray cluster answers at {address}; is it up, and the port forwarded? {_NEED}")
    return address


def refused(address: str, error: BaseException) -> ConfigError:
    """One line for the error that Ray raises when it refuses the connection."""
    text = one_line(error, 600)
    if type(error).__name__ == "AuthenticationError" or "401" in text[:80] or "403" in text[:80]:
        return ConfigError(
            f"{address}: the cluster requires a token, or a different one; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
            "(or have its token in ~/.ray/auth_token)"
        )
    return ConfigError(f"{address}: {text[:300] or type(error).__name__}")


def jobs_client(address: str) -> JobSubmissionClient:
    """Ray's client of the Jobs API. Raises `ConfigError`."""
    import ray
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers the variable to the argument
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise refused(address, error) from error


def open_cluster(given: str | None) -> Cluster:
    """Connects. Raises `ConfigError` when there is no cluster or it refuses the connection."""
    address = reachable(find_address(given))
    return JobsCluster(address) if address.startswith(("http://", "https://")) else Cluster(address)


class Cluster:
    """A cluster whose Ray is reachable directly: this is one of its machines, or the address is ray://."""

    def __init__(self, address: str) -> None:
        import ray

        self.address = address
        self._jobs: JobSubmissionClient | None = None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            if not ray.is_initialized():
                ray.init(address=address, namespace=run_api.NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            raise refused(address, error) from error

    def running(self) -> list[str]:
        """Names of the running runs."""
        return run_api.running()

    def call(self, operation: str, run: str | None = None, **arguments: Any) -> Any:
        """`jobs.cluster.run_api.OPERATION(run=..., **arguments)`."""
        return run_api.OPERATIONS[operation](**({"run": run} if run else {}), **arguments)

    def follow(self, operation: str, run: str) -> Iterator[Any]:
        """The values of a generator in `jobs.cluster.run_api`."""
        return run_api.OPERATIONS[operation](run=run)

    @property
    def jobs(self) -> JobSubmissionClient | None:
        """None where the cluster has no dashboard."""
        if self._jobs is None:
            with contextlib.suppress(ConfigError):
                self._jobs = jobs_client(self.address)
        return self._jobs

    def jobs_of(self, run: str | None = None) -> list[Any]:
        """The jobs submitted for `run` (None: for any run), newest first."""
        if self.jobs is None:
            return []
        try:
            jobs = [job for job in self.jobs.list_jobs() if RUN_KEY in (job.metadata or {})]
        except RuntimeError as error:
            raise refused(self.address, error) from error
        jobs = [job for job in jobs if run is None or job.metadata[RUN_KEY] == run]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)


class JobsCluster(Cluster):
    """A cluster of which only the dashboard's port is reachable: each call is a small Ray job (a few seconds)."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._jobs = jobs_client(address)

    def running(self) -> list[str]:
        from ray.util.state import list_actors

        try:
            actors = list_actors(self.address, filters=[("state", "=", "ALIVE")], limit=10_000)
        except Exception as error:  # Ray's state API raises its own exceptions, which differ between versions
            raise refused(self.address, error) from error
        return list(
            run_api.controllers(actor.name or "" for actor in actors if actor.ray_namespace == run_api.NAMESPACE)
        )

    def call(self, operation: str, run: str | None = None, **arguments: Any) -> Any:
        return next(self._answers(operation, run, arguments))

    def follow(self, operation: str, run: str) -> Iterator[Any]:
        return self._answers(operation, run, {})

    def _answers(self, operation: str, run: str | None, arguments: dict[str, Any]) -> Iterator[Any]:
        assert self._jobs is not None
        running = self.running()
        if run is not None and run not in running:
            raise run_api.unknown_run(run, running)
        if not running and operation == "overview":
            yield []
            return
        text = json.dumps(({"run": run} if run else {}) | arguments)
        try:
            job = self._jobs.submit_job(
                entrypoint=shlex.join(["python", "-m", "jobs.cluster.run_api", operation, text]),
                submission_id=f"rushes-{operation}-{uuid.uuid4().hex[:12]}",
                metadata={CALL_KEY: operation},
                runtime_env=self._environment(run),
            )
        except (RuntimeError, ConnectionError, ValueError, OSError) as error:
            raise refused(self.address, error) from error
        answered = False
        try:
            rest = ""
            for piece in tail(self._jobs, job):
                *lines, rest = (rest + piece).split("\n")
                for line in lines:
                    if line.startswith(run_api.ANSWER):
                        answered = True
                        yield _value(json.loads(line.removeprefix(run_api.ANSWER)))
            if not answered:
                last = " ".join(self._jobs.get_job_logs(job).split())[-300:]
                message = one_line(self._jobs.get_job_info(job).message or "")
                raise RunFailed(f"{self.address}: the call to the cluster failed: {message} {last}")
        finally:
            self._clean_up(job, stop=operation in run_api.STREAMS)

    def _environment(self, run: str | None) -> dict[str, Any]:
        """The working directory of the run's own job, so that the same sources answer; else that of another running run
        (those of ended jobs are deleted by Ray); else none: the cluster must have Rushes installed."""
        for job in [*(self.jobs_of(run) if run else []), *self.jobs_of()]:
            if job.status not in TERMINAL and (job.runtime_env or {}).get("working_dir"):
                return {"working_dir": job.runtime_env["working_dir"]}
        return {}

    def _clean_up(self, job: str, stop: bool) -> None:
        """Removes the job of a call from the cluster's list, while the caller goes on with the answer; and those that
        earlier calls have left, such as killed ones."""
        assert self._jobs is not None
        remover = threading.Thread(target=_remove_job, args=(self._jobs, job, stop), name=f"remove {job}")
        remover.start()  # not a daemon: the process waits for it


def _remove_job(client: JobSubmissionClient, job: str, stop: bool) -> None:
    """A job may be deleted once Ray's own monitor has seen its end: else the monitor finds nothing under its name and
    lists it anew, as failed."""
    with contextlib.suppress(RuntimeError, ConnectionError, OSError):
        if stop:
            client.stop_job(job)
        limit = time.monotonic() + END_S
        while client.get_job_status(job) not in TERMINAL and time.monotonic() < limit:
            time.sleep(POLL_S)
        time.sleep(SETTLE_S)
        client.delete_job(job)  # one that takes longer is left to the next call
    with contextlib.suppress(RuntimeError, ConnectionError, OSError):
        for other in client.list_jobs():
            left = _CALL_ID.fullmatch(other.submission_id or "") and other.status in TERMINAL
            if left and time.time() - (other.end_time or 0) / 1000 > LEFT_BEHIND_S:
                client.delete_job(other.submission_id)


def _value(answer: dict[str, Any]) -> Any:
    if "error" in answer:
        kind = getattr(errors, str(answer.get("kind")), None)
        if not (isinstance(kind, type) and issubclass(kind, errors.RushesError)):
            kind = RunFailed
        raise kind(answer["error"])
    return answer["value"]


def tail(client: JobSubmissionClient, job: str) -> Iterator[str]:
    """The job's output, piece by piece, until the job ends. Reconnects where a connection was lost."""
    import aiohttp

    loop, seen, failures = asyncio.new_event_loop(), 0, 0
    try:
        while True:
            position, waiting = 0, None
            stream = cast("AsyncGenerator[str, None]", client.tail_job_logs(job))
            try:
                while True:
                    waiting = loop.create_task(stream.__anext__())
                    piece = loop.run_until_complete(waiting)
                    failures = 0
                    position += len(piece)
                    if position > seen:
                        yield piece[-(position - seen) :]
                        seen = position
            except StopAsyncIteration:
                pass
            except (RuntimeError, aiohttp.ClientError, ConnectionError, OSError) as error:
                failures += 1
                if failures > 5:
                    raise RunFailed(f"job {job}: its log cannot be followed: {one_line(error, 600)}") from error
                time.sleep(POLL_S * 2**failures)
                continue
            finally:  # also after Ctrl-C, which leaves the task where it was
                if waiting is not None and not waiting.done():
                    waiting.cancel()
                    loop.run_until_complete(asyncio.wait([waiting]))
                loop.run_until_complete(stream.aclose())
            if client.get_job_status(job) in TERMINAL:
                return
            time.sleep(POLL_S)
    finally:
        loop.close()
