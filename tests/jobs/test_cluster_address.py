"""Where the Ray cluster is: the same answer for runs, preflight, doctor and the cluster commands."""

import socket

import pytest
from command import run
from fake_checkpoint import fake_config

from jobs.cluster import client
from jobs.commands import doctor
from pipeline.core import cluster_address
from pipeline.tools import preflight_machine


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cluster_address, "CLUSTER_FILE", tmp_path / "ray_current_cluster")


def answers(tmp_path, address=None):
    """(a run's, preflight's, the cluster commands', doctor's line)."""
    cfg = fake_config(tmp_path)
    cfg = cfg.model_copy(update={"ray": cfg.ray.model_copy(update={"address": address})})
    (finding,) = doctor.check_ray()
    return (
        cluster_address.cluster_address(address),
        preflight_machine.joins_cluster(cfg),
        client.find_address(address),
        finding.detail,
    )


def test_no_cluster(tmp_path):
    assert answers(tmp_path)[:3] == (None, False, None)
    assert answers(tmp_path)[3].startswith("none running")


def test_the_cluster_that_ray_start_runs_here(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        cluster_address.CLUSTER_FILE.write_text(f"{address}\n")
        assert answers(tmp_path)[:3] == answers(tmp_path, "auto")[:3] == (address, True, address)
        assert f"a cluster runs at {address}" in answers(tmp_path)[3]
        assert answers(tmp_path, "local")[:3] == (None, False, None)


def test_a_file_left_over_from_a_cluster_that_has_ended_is_no_cluster(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for text in (f"127.0.0.1:{port}", "", "nonsense", "127.0.0.1:port"):
        cluster_address.CLUSTER_FILE.write_text(text)
        assert answers(tmp_path)[:3] == (None, False, None), text
        assert answers(tmp_path)[3].startswith("none running"), text
    assert "none running" in run(capsys, "doctor", "--dir", tmp_path)[1]


def test_addresses_that_are_set_come_first(tmp_path, monkeypatch):
    assert answers(tmp_path, "h:6379")[:3] == ("h:6379", True, "h:6379")
    monkeypatch.setenv("RAY_ADDRESS", "g:6379")
    assert answers(tmp_path)[:3] == answers(tmp_path, "auto")[:3] == ("g:6379", True, "g:6379")
    assert "RAY_ADDRESS=g:6379" in answers(tmp_path)[3]
    assert answers(tmp_path, "local")[:3] == (None, False, None)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert answers(tmp_path)[:3] == (None, False, None) and answers(tmp_path, "h:1")[0] == "h:1"


def test_auto_without_a_cluster_here_is_left_to_ray(tmp_path):
    assert answers(tmp_path, "auto")[:3] == ("auto", True, None)
