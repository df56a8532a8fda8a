"""Shared fixtures: quiet libraries, one compute thread, small random-weight checkpoints made once per session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `pytest -n 2 --dist loadgroup` a file's tests share a process, and all that start Ray share one, which comes
    first: they mostly wait, and two Rays of one machine would find each other."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


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
