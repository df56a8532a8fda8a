"""Hostile clients of `rushes serve-reward`: honest ones are answered, memory is bounded, /health tells the truth."""

import asyncio
import base64
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from jobs.common.memory_budget import GrowingReservation, MemoryBudget, NoRoom, TooLarge
from pipeline.rewards.models.web import png_base64

MB = 2**20
MEMORY_MB = 512
SCORER = """
import asyncio
import time

def level(frames, prompts, metadata):
    for prompt in prompts:
        if prompt.startswith("raise "):
            raise {
                "cancelled": asyncio.CancelledError, "generator": GeneratorExit, "exit": SystemExit,
                "stop": StopIteration, "memory": MemoryError, "bug": KeyError,
            }[prompt.removeprefix("raise ")]
        if prompt == "stuck":
            time.sleep(6)
    return frames.reshape(len(prompts), -1).mean(1)

level.batched, level.reads = True, "video"
"""


class Server:
    def __init__(self, folder, *args):
        (folder / "own.py").write_text(SCORER)
        name = f"{folder / 'own.py'}:level"
        self.output = folder / "output.txt"  # no pipe, which would fill
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "jobs.cli", "serve-reward", name, "--port", "0", "--set", f"{name}.batch_items=8",
                *args,
            ],
            stdout=self.output.open("w"), stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        while not (found := re.search(r":(\d+)/score", self.output.read_text())):
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)
        self.port = int(found.group(1))

    def ask(self, path="/score", body=None, timeout=60, **headers):
        """(status, answer)"""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=data, headers={"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def connect(self, text=b""):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(text)
        return connection

    def end(self, timeout=45):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout)
        return self.output.read_text()


@pytest.fixture
def start(tmp_path):
    servers = []

    def start(*args):
        servers.append(Server(tmp_path, *args))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


def honest(level, prompt="a"):
    return {"version": 1, "items": [{"prompt": prompt, "frames": [png_base64(np.full((8, 8, 3), level, np.uint8))]}]}


def black_png(side):
    """A real PNG of side x side in a thousandth of its size."""
    squeeze, rows = zlib.compressobj(9), b""
    line = bytes(1 + 3 * side)
    rows = b"".join(squeeze.compress(line) for _ in range(side)) + squeeze.flush()

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


@pytest.mark.slow
def test_many_hostile_requests_beside_honest_ones(start):
    server = start("--memory-gb", str(MEMORY_MB / 1024), "--max-mb", "8")
    idle_mb = psutil.Process(server.process.pid).memory_info().rss / MB
    assert server.ask(body=honest(3))[1]["scores"] == [3]
    bomb = black_png(4000)  # 50 kB, 48 MB decoded
    post = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    kinds = [
        {"version": 1, "items": [{"prompt": "", "frames": [bomb]}]},  # fits, but not many at once
        {"version": 1, "items": [{"prompt": "", "frames": [bomb] * 20}]},  # 1 GB decoded
        b'{"version": 1, "items": [' + b"[]," * 500_000 + b"[]]}",
        b'{"version": 1, "items": [{"prompt": "", "metadata": {"x": ' + b"[" * 200_000,
        b"{" + b",".join(b'"%d":0' % n for n in range(200_000)) + b"}",
        b"x" * (7 * MB),
        b"x" * (9 * MB),
        honest(1, "raise cancelled"),
        honest(1, "raise generator"),
        honest(1, "raise exit"),
        honest(1, "raise stop"),
    ]
    kinds = [kind if isinstance(kind, bytes) else json.dumps(kind).encode() for kind in kinds]
    over, peak_mb, health = threading.Event(), [0.0], []

    def look():
        process = psutil.Process(server.process.pid)
        while not over.wait(0.05):
            peak_mb[0] = max(peak_mb[0], process.memory_info().rss / MB)

    def ask_health():
        while not over.wait(0.3):
            health.append(server.ask("/health", timeout=20)[0])

    def attack(number):
        try:
            return server.ask(body=kinds[number % len(kinds)], timeout=90)[0]
        except OSError:  # the server need not read all of it
            return None

    watchers = [threading.Thread(target=look), threading.Thread(target=ask_health)]
    for watcher in watchers:
        watcher.start()
    # never end: no header, half a header, a body that is announced, most of a body, a chunked one
    silent = [b"", b"POST /sc", f"{post}Content-Length: 8000000\r\n\r\n".encode()]
    silent += [silent[-1] + b"x" * 7_900_000, f"{post}Transfer-Encoding: chunked\r\n\r\n5\r\nxxxxx".encode()]
    held = [server.connect(silent[n % 3]) for n in range(150)] + [server.connect(silent[3 + n % 2]) for n in range(40)]
    try:
        with ThreadPoolExecutor(24) as hostile, ThreadPoolExecutor(4) as clients:
            attacks = [hostile.submit(attack, number) for number in range(77)]
            answers = list(clients.map(lambda level: server.ask(body=honest(level)), range(1, 61)))
            statuses = {future.result() for future in attacks}
    finally:
        over.set()
        for watcher in watchers:
            watcher.join()
        for connection in held:
            connection.close()
    assert [(status, answer.get("scores")) for status, answer in answers] == [(200, [n]) for n in range(1, 61)]
    assert statuses <= {200, 408, 413, 422, 503, None} and {413, 422} <= statuses
    assert peak_mb[0] < idle_mb + 1.5 * MEMORY_MB
    assert health and set(health) == {200}
    memory = server.ask("/health")[1]["memory_mb"]
    assert memory["parsed"] == memory["decoded"] == 0
    assert "ended" not in server.end()


def test_what_is_too_large_for_the_server_is_refused_before_it_is_decoded(start):
    server = start("--memory-gb", "0.25", "--max-mb", "8")
    picture = black_png(6000)  # 108 MB
    video = {"version": 1, "items": [{"prompt": "", "frames": [picture] * 3}]}
    started = time.monotonic()
    status, answer = server.ask(body=video)
    assert status == 413 and "--memory-gb" in answer["error"] and "\n" not in answer["error"]
    assert time.monotonic() - started < 5
    status, answer = server.ask(body=b'{"version": 1, "items": [' + b"[]," * 500_000 + b"[]]}")
    assert status == 413
    compressed = zlib.compress(json.dumps(honest(1)).encode())
    assert server.ask(body=compressed, **{"Content-Encoding": "deflate"})[0] == 415


@pytest.mark.parametrize("kind", ["cancelled", "generator", "exit", "stop", "memory", "bug"])
def test_whatever_a_scorer_raises_the_loop_goes_on(kind, start):
    server = start()
    status, answer = server.ask(body=honest(1, f"raise {kind}"))
    assert status == 422 and "raised" in answer["error"] and "\n" not in answer["error"]
    assert server.ask(body=honest(2))[1]["scores"] == [2] and server.ask("/health")[0] == 200


def test_health_says_when_the_scorer_is_stuck_and_when_it_is_not_any_more(start):
    server = start("--stuck-s", "1")
    with ThreadPoolExecutor(2) as pool:
        stuck = pool.submit(server.ask, body=honest(1, "stuck"))
        while server.ask("/health")[1]["call_s"] is None:
            time.sleep(0.02)
        waiting = pool.submit(server.ask, body=honest(2))
        assert server.ask("/health")[0] == 200
        for answered in (stuck, waiting):
            status, answer = answered.result(timeout=6)
            assert status == 503 and "has run for" in answer["error"]
    status, health = server.ask("/health")
    assert status == 503 and health["status"] == "failed" and "has run for" in health["error"]
    started = time.monotonic()
    assert server.ask(body=honest(2))[0] == 503 and time.monotonic() - started < 1.5
    while server.ask("/health")[0] == 503:
        assert time.monotonic() - started < 20
        time.sleep(0.1)
    assert server.ask(body=honest(2))[1]["scores"] == [2]


def test_a_stuck_scorer_does_not_hold_the_end(start):
    server = start("--stuck-s", "1")
    assert server.ask(body=honest(1, "stuck"))[0] == 503
    started = time.monotonic()
    output = server.end(timeout=10)
    assert time.monotonic() - started < 4 and server.process.returncode == 1 and "error: a call of the scorer" in output


def test_health_says_when_the_loop_has_ended():
    from jobs.common import scoring_loop

    class Dead(scoring_loop.ScoringLoop):
        async def _call(self, groups):
            raise asyncio.CancelledError  # as nothing may

    class Runner:
        name = "r"

        class cfg:
            batch_items = 1

    async def ask():
        loop = Dead(Runner(), 10)
        context = loop.running()
        await anext(context)
        work = scoring_loop.Work([], [[0]], asyncio.get_running_loop().create_future())
        with pytest.raises(scoring_loop.NotScoring, match=r"loop has ended \(CancelledError"):
            await asyncio.wait_for(loop.score(work), 3)
        assert "CancelledError" in loop.problem
        with pytest.raises(scoring_loop.NotScoring):
            await loop.score(work)
        with pytest.raises(StopAsyncIteration):
            await anext(context)

    asyncio.run(ask())


@pytest.mark.parametrize(
    "host, allowed",
    [
        ("localhost", True), ("localhost:8900", True), ("127.0.0.1:1", True), ("[::1]:5", True), ("LOCALHOST", True),
        ("proxy.example:80", True), ("evil.example", False), ("localhost.evil.example", False), ("10.0.0.1", False),
        ("", False), ("127.0.0.1.evil.example", False),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_unless_told(host, allowed, hosts):
    for path in ("/health", "/schema"):
        status, answer = hosts.ask(path, Host=host)
        assert (status == 200) if allowed else (status == 421 and "--allow-host" in answer["error"])


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("hosts"), "--allow-host", "proxy.example")
    yield server
    server.process.kill()
    server.process.wait()


def test_small_requests_pass_large_ones_and_all_bytes_come_back():
    async def check():
        budget, order = MemoryBudget(100), []

        async def take(size, within_s=5.0):
            with await budget.reserve(size, within_s):
                order.append(size)
                await asyncio.sleep(0.01)

        with await budget.reserve(90, 1):
            tasks = [asyncio.create_task(take(size)) for size in (80, 40, 10, 60, 20)]
            given_up = asyncio.create_task(take(70, within_s=0.05))
            cancelled = asyncio.create_task(take(30))
            await asyncio.sleep(0.02)
            cancelled.cancel()
            await asyncio.sleep(0.1)
            assert order == [10]
            with pytest.raises(NoRoom):
                await given_up
        await asyncio.gather(*tasks)
        assert order == [10, 20, 40, 60, 80] and budget.free == 100
        with pytest.raises(TooLarge):
            await budget.reserve(101, 1)

    asyncio.run(check())


def test_the_slowest_body_gives_way():
    async def check():
        budget, ends = MemoryBudget(100), []

        async def send(name, size, pause):
            arriving = GrowingReservation(budget)
            try:
                async with asyncio.timeout(10) as deadline:
                    arriving.growing_under(deadline)
                    for _ in range(size):
                        await arriving.grow(1)
                        await asyncio.sleep(pause)
            except (TimeoutError, NoRoom):
                ends.append((name, "gave way"))
            else:
                ends.append((name, "arrived"))
            finally:
                arriving.release()

        stalled = [asyncio.create_task(send(f"slow {n}", 51, 0.005)) for n in range(2)]
        await asyncio.sleep(0.3)
        await send("honest", 60, 0)
        assert ("honest", "arrived") in ends
        await asyncio.gather(*stalled)
        assert budget.free == 100

    asyncio.run(check())
