"""Shared fixtures: quiet libraries, small random-weight checkpoints made once per session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray come first: with several processes, they are the longest chain. Then files with slow tests,
    so that no process is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.get_closest_marker("ray") is None, item.path not in slow))


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
