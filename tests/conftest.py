"""Shared fixtures: quiet libraries, small random-weight checkpoints made once per session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import contextlib  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray come first: with several processes, they are the longest chain; of these, files that start
    one of their own come before those that share one. Then files with slow tests, so that no process is left with one
    of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    shared = {item.path for item in items if "cluster" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda i: (i.get_closest_marker("ray") is None, i.path in shared, i.path not in slow))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With `pytest -n 2 --dist loadscope` a file's tests share a process, and all files that start Ray share one: they
    mostly wait, and two Rays of one machine would find each other. (xdist 3.8's own `loadgroup` does nothing under
    pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    root = Path(__file__).parent.parent

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if file.endswith("test_families.py"):
                return nodeid.partition("[")[2] or file  # nothing is shared by two families
            return "ray" if "pytest.mark.ray" in (root / file).read_text() else file

    return ByFile(config, log)


_ray = contextlib.ExitStack()
FORKED_WITH = [
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "pipeline.generators.export",
    "pipeline.generators.policy",
    "pipeline.learner.learner",
    "pipeline.rewards.runner",
]


@pytest.fixture(scope="session")
def cluster():
    """A local Ray of 8 CPUs and 200 MiB, for all tests of a process that only need one."""
    import tiny

    from jobs.cluster.forked_workers import fork_server
    from jobs.cluster.ray_session import RaySession

    init = {"num_cpus": 8, "object_store_memory": 200 * 2**20}
    cfg = tiny.config(Path("unused"), ray={"address": "local", "init": init})
    with _ray, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_enable_metrics_collection", "1")  # a Ray without a dashboard would not
        patch.setenv("RAY_metrics_report_interval_ms", "2500")  # a test waits; forgotten after 12 intervals
        # Threads do not matter to tiny tensors, so that all workers can be forked.
        python = _ray.enter_context(fork_server(FORKED_WITH, {}, threads=None))
        yield _ray.enter_context(RaySession(cfg, python=python))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The shared Ray ends before the first test that is not about Ray, and might find it."""
    if item.get_closest_marker("ray") is None:
        _ray.close()


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory) -> Path:
    import tiny

    return tiny.sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory) -> Path:
    import tiny

    return tiny.wan(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture
def serve():
    """Starts HTTP servers on localhost that answer as told, and ends them."""
    from http_server import Server

    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()
