"""Waits of the driver: a cluster that is dead or does not answer, a controller that is silent, and the signals."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jobs.cluster import ray_session
from jobs.cluster.ray_session import RaySession
from jobs.launch import supervise
from jobs.launch.stop_signals import StopSignals
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, RunInterrupted

ROOT = Path(__file__).parents[2]


def config(address):
    return Config.model_validate(
        {
            "generator": {"pretrained": "x"},
            "prompts": {"train": "x.txt"},
            "rewards": {"j": {"scorer": "jpeg_compressibility"}},
            "ray": {"address": address},
        }
    )


@pytest.fixture
def silent_port():
    """Takes connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    return port


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "nowhere.invalid:{}"])
def test_a_dead_cluster_is_named_within_seconds(form, free_port):
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"ray\.address: no Ray answers at .*nothing listens.* or RAY_ADDRESS"):
        RaySession(config(form.format(free_port))).__enter__()
    assert time.monotonic() - started < 10


def test_a_cluster_that_does_not_answer_is_given_up(silent_port, monkeypatch):
    monkeypatch.setattr(ray_session, "JOIN_S", 2.0)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"no Ray answers at"):
        RaySession(config(f"127.0.0.1:{silent_port}")).__enter__()
    assert time.monotonic() - started < 10


HANGING = """
import sys, time
from pathlib import Path
from jobs.cluster import ray_session
from jobs.cluster.ray_session import RaySession
from jobs.launch.stop_signals import StopSignals
sys.path.insert(0, str(Path("tests/jobs").absolute()))
from test_waits import config
ray_session._answers = lambda address: time.sleep(3600)
signals = StopSignals()
with signals:
    print("waiting", flush=True)
    RaySession(config(sys.argv[1]), signals.check).__enter__()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_wait_for_a_cluster(number, silent_port):
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, f"127.0.0.1:{silent_port}"], cwd=ROOT, env=os.environ | {"PYTHONPATH": "."},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(1)
        process.send_signal(number)
        error = process.communicate(timeout=10)[1]
        assert "RunInterrupted: stopped while it was starting" in error
    finally:
        process.kill()


def test_sighup_asks_as_sigterm_does_unless_it_is_ignored():
    for number in (signal.SIGHUP, signal.SIGTERM):
        with StopSignals() as signals:
            signals.check()
            os.kill(os.getpid(), number)
            assert signals.stop_requested
            with pytest.raises(RunInterrupted):
                signals.check()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.stop_requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_silent_controller_is_told_about_and_then_counts_as_dead(monkeypatch):
    notes = []
    view = type("View", (), {"note": lambda self, text: notes.append(text)})()
    asked = type("Asked", (), {"stop_requested": False})()
    watch = object.__new__(supervise._Watch)
    watch.host, watch._answered, watch._told = "here", True, False
    for seconds in (5, 29, 31, 60, supervise.SILENT_S - 1):
        watch._silent(seconds, view, asked)
    assert len(notes) == 1 and "does not answer" in notes[0] and "here" in notes[0]
    from actors.ray_errors import describe

    with pytest.raises(Exception) as caught:
        watch._silent(supervise.SILENT_S + 1, view, asked)
    assert supervise._is_death(caught.value) and describe(caught.value) == "it does not answer for 301 s"
    asked.stop_requested = True
    with pytest.raises(type(caught.value)):
        watch._silent(supervise.SILENT_S / 2 + 1, view, asked)
    watch._answered, asked.stop_requested = False, False
    watch._silent(1000, view, asked)  # a node for it may take long


def test_the_http_deadline_covers_connection_headers_and_body():
    from pipeline.core.errors import RewardUnavailable
    from pipeline.rewards.models.web import JsonClient

    dripped = {
        "headers": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000,
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n" + b"1" * 10_000,
        "error": b"HTTP/1.1 500 Bad\r\nContent-Length: 10000\r\n\r\n" + b"1" * 10_000,
        "nothing": b"",
    }
    for kind, text in dripped.items():
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def drip(listening=listening, text=text):
                connection = listening.accept()[0]
                with connection:
                    start = text.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in text else 0
                    try:
                        connection.sendall(text[:start])
                        for byte in text[start:]:
                            connection.sendall(bytes([byte]))
                            time.sleep(0.05)
                        time.sleep(5)
                    except OSError:
                        pass

            threading.Thread(target=drip, daemon=True).start()
            started = time.monotonic()
            with pytest.raises(RewardUnavailable, match="no answer within 0.5 s"):
                JsonClient(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_s=0.5, retries=0).post("", {})
            assert time.monotonic() - started < 1.5, kind
