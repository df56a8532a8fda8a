"""Ray workers that are forked from one process with the libraries imported: a new actor costs a tenth of a second
instead of six. What an actor does, and how it ends, is as ever.

The raylet starts each worker as `PYTHON setup_worker.py ...`, with the `sys.executable` that its driver had. Under
`forked_workers` that is a small script, which passes arguments, environment and open files to a server and waits for
the worker's end. Everything else, workers with a Python of their own included, is started as without it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster.ray_session import RaySession
from pipeline.config.schema import Config

IMPORTED = [
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "actors.controller",
    "actors.learner_rank",
    "actors.reward_server",
    "actors.rollout_worker",
    "pipeline.generators.export",
    "pipeline.generators.policy",
    "pipeline.learner.learner",
    "pipeline.rewards.runner",
    "ray._private.workers.default_worker",
    "ray.util.metrics",
]

# Without the site module it takes 15 ms. Lengths before contents: the message is larger than a socket's buffer.
SCRIPT = """#!{python} -IS
import json, os, socket, sys
context = [a for a in sys.argv[1:] if a.startswith("--serialized-runtime-env-context=")]
own = json.loads(context[0].partition("=")[2] or "{{}}") if context else {{}}
plain = own.get("py_executable") in (None, {python!r}) and not own.get("command_prefix")
worker = [i for i, argument in enumerate(sys.argv) if argument.endswith("default_worker.py")]
if not (worker and plain):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
message = json.dumps({{
    "argv": [a for a in sys.argv[worker[0]:] if not a.startswith(("--serialized-runtime-env-context=", "--language="))],
    "env": {{**os.environ, **own.get("env_vars", {{}})}},
    "cwd": os.getcwd(),
}}).encode()
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [len(message).to_bytes(8, "big")], [0, 1, 2])
server.sendall(message)
server.recv(1)  # the worker holds the other end
"""


@contextlib.contextmanager
def session_of_forked_workers(cfg: Config, folder: Path) -> Iterator[RaySession]:
    """A `RaySession` of its own Ray, whose workers are forked. `folder`: for the script and the socket."""
    script, address, python = folder / "python", folder / "fork", sys.executable
    script.write_text(SCRIPT.format(python=python, address=str(address)))
    script.chmod(0o755)
    command = [python, __file__, str(address)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin and server.stdout  # and it ends when its input ends
        assert server.stdout.readline() == "ready\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(script))
            session = RaySession(cfg).__enter__()
        try:
            yield session
        finally:
            session.close()
            server.stdin.close()


def next_worker(listening: socket.socket) -> tuple[dict[str, Any], socket.socket, list[int]]:
    """What the script has sent, its connection and its open files. Ends the process when the standard input ends."""
    ready, _, _ = select.select([listening, sys.stdin], [], [])
    if sys.stdin in ready:
        os._exit(0)
    connection, _ = listening.accept()
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    message = b""
    while len(message) < int.from_bytes(head, "big"):
        message += connection.recv(2**16)
    return json.loads(message), connection, files


def serve(address: str) -> None:
    """Forks the workers that are asked for, and becomes a worker in each fork."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        print("ready", flush=True)
        worker, connection, files = next_worker(listening)
        os.environ.update(worker["env"])  # the libraries read them when they are imported; of a job all are the same
        for name in IMPORTED:
            importlib.import_module(name)
        gc.freeze()  # else the first collection in a worker copies all of it
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # an ended worker is gone at once
        while os.fork() > 0:
            for file in (connection.detach(), *files):
                os.close(file)
            worker, connection, files = next_worker(listening)
    os.setpgid(0, 0)  # when a worker ends, Ray ends all of its process group
    connection.detach()  # closed when this process ends
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(worker["env"])
    os.chdir(worker["cwd"])
    sys.argv = worker["argv"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
