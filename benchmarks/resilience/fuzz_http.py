"""The areas of the fuzz that go over HTTP: bodies to a real `serve-reward`, and answers to a real scorer."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.resilience.fuzz import Case
from benchmarks.resilience.fuzz_inputs import JSON_TEXTS, changed_values, damaged
from pipeline.core.errors import RewardError, RushesError
from pipeline.core.types import Media, PromptItem

FRAMES = np.zeros((1, 1, 8, 8, 3), np.uint8)
ITEM = {"prompt": "a", "metadata": {}, "fps": 8.0}


# ------------------------------------------------------------------------------------------------ answers to us


class _Endpoint:
    """Answers each request with `data`, raw."""

    def __init__(self) -> None:
        outer, self.data, self.status = self, b"", 200

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                with contextlib.suppress(OSError):
                    if outer.status == 0:  # not HTTP at all
                        self.wfile.write(outer.data)
                        return
                    self.send_response(outer.status)
                    self.send_header("Content-Length", str(len(outer.data)))
                    self.end_headers()
                    self.wfile.write(outer.data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


def endpoint_answers(work: Path, rng: random.Random) -> Iterator[Case]:
    """Whatever a server answers is a score for each take, or an error of the reward."""
    from pipeline.config.schema import RewardConfig
    from pipeline.rewards.runner import build_reward

    endpoint = _Endpoint()
    plain = {"scores": [0.5, 0.25], "parts": {"colour": [0.9, None]}}
    runner = build_reward(
        "far", RewardConfig(scorer="http", args={"url": endpoint.url, "retries": 0, "timeout_s": 2.0})
    )
    media = Media(frames=np.concatenate([FRAMES, FRAMES]), fps=8.0)
    prompts = [PromptItem(index=0, text="a"), PromptItem(index=1, text="b")]

    def ask(status: int, data: bytes) -> Callable[[], None]:
        def call() -> None:
            endpoint.status, endpoint.data = status, data
            try:
                scores = runner.run(media, prompts, None)
            except RewardError:
                raise
            except RushesError as error:
                raise AssertionError(f"{type(error).__name__} is no RewardError") from error
            assert scores.values.shape == (2,) and np.isfinite(scores.values).all()

        return call

    area = "endpoint answers"
    try:
        for what, value in changed_values(plain, rng, 80):
            yield Case(area=area, name=what, run=ask(200, json.dumps(value).encode()))
        for text in JSON_TEXTS:
            data = text.encode("utf-8", "surrogatepass")
            yield Case(area=area, name=text[:30], run=ask(200, data), must_refuse=True)
        for what, data in damaged(json.dumps(plain).encode(), rng, 60):
            yield Case(area=area, name=what, run=ask(200, data))
        for status in (0, 100, 204, 301, 302, 400, 401, 404, 409, 413, 418, 422, 429, 500, 502, 503, 599):
            for data in (b"", b"{", json.dumps(plain).encode(), b"\xff" * 300, b"HTTP/9.9 abc\r\n\r\n"):
                yield Case(area=area, name=f"status {status} {data[:12]!r}", run=ask(status, data), must_refuse=True)
    finally:
        endpoint.http.shutdown()


# ------------------------------------------------------------------------------------------------- bodies to us


class _Server:
    def __init__(self) -> None:
        command = [sys.executable, "-m", "jobs.cli", "serve-reward", "jpeg_compressibility", "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r":(\d+)/score", line)
        assert found is not None, line
        self.port = int(found.group(1))
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def post(self, data: bytes, **headers: str) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/score", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=15) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def raw(self, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            with contextlib.suppress(OSError):
                while chunk := connection.recv(4096):
                    received += chunk
            return received

    def healthy(self) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
            return answer.status == 200


def bodies(work: Path, rng: random.Random) -> Iterator[Case]:
    """Any body is scored, or refused with a 4xx and one JSON line; /health stays right."""
    from pipeline.rewards.models.protocol import encode_frames

    server = _Server()
    plain = {"version": 1, "items": [{**ITEM, **encode_frames(FRAMES[0], 8.0, "png")}]}
    area = "http bodies"

    def post(data: bytes, **headers: str) -> Callable[[], None]:
        def call() -> None:
            status, answer = server.post(data, **headers)
            assert server.healthy()
            if status == 200:
                assert all(np.isfinite(score) for score in json.loads(answer)["scores"])
                return
            assert 400 <= status < 500, (status, answer[:300])
            raise RushesError(json.loads(answer)["error"] if answer.startswith(b"{") else answer.decode())  # aiohttp's

        return call

    def raw(data: bytes) -> Callable[[], None]:
        def call() -> None:
            answer = server.raw(data)
            assert server.healthy() and b"Traceback" not in answer and not answer.startswith(b"HTTP/1.1 5"), answer[
                :300
            ]
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RushesError(answer[:60].decode("latin-1").replace("\r\n", " "))

        return call

    try:
        yield Case(area=area, name="good", run=post(json.dumps(plain).encode()))
        for what, value in changed_values(plain, rng, 120):
            yield Case(area=area, name=what, run=post(json.dumps(value).encode()))
        for text in JSON_TEXTS:
            data = text.encode("utf-8", "surrogatepass")
            yield Case(area=area, name=text[:30], run=post(data), must_refuse=True)
        for what, data in damaged(json.dumps(plain).encode(), rng, 60):
            yield Case(area=area, name=what, run=post(data))
        for name, value in [
            ("Content-Type", "x"),
            ("Content-Encoding", "gzip"),
            ("Host", "evil.example"),
            ("Expect", "x"),
        ]:
            yield Case(area=area, name=f"{name}: {value}", run=post(json.dumps(plain).encode(), **{name: value}))
        head = b"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        for data in (
            b"", b"\x00" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", head, head + b"Content-Length: -1\r\n\r\n",
            head + b"Content-Length: 99999999999999\r\n\r\n{", head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}", head + b"A: " + b"x" * 70_000 + b"\r\n\r\n",
            b"GET /../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"DELETE /score HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        ):  # fmt: skip
            yield Case(area=area, name=repr(data[:50]), run=raw(data), must_refuse=True)
    finally:
        server.process.terminate()
        deadline = time.monotonic() + 20
        while server.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        server.process.kill()


AREAS = {"endpoint answers": endpoint_answers, "http bodies": bodies}
