"""Workers of a local Ray that are forked from one process with the libraries imported.

An actor's process spends some seconds of CPU on imports, and a small run on two cores has five of them: forked, all of
them import once, beside the checks and Ray's own start. The raylet starts a worker as `PYTHON setup_worker.py …`, with
the `sys.executable` that its driver had. Here that is a small script, which passes arguments, environment and open
files to the process that forks, and waits for the worker's end. A worker that needs a Python of its own, another thread
count, or a server that is gone, is started as without it. What an actor does, and how it ends, is as ever.
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
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.ray_options import actor_env, cores
from pipeline.config.schema import Config
from pipeline.core.cluster_address import cluster_address

_LIBRARIES = ("pipeline.generators.policy", "pipeline.learner.learner", "pipeline.rewards.runner")
# Only with the environment of a worker: Ray reads it when it is imported.
_ACTORS = (
    "ray._private.workers.default_worker",
    "ray.util.metrics",
    "actors.controller",
    "actors.learner_rank",
    "actors.reward_server",
    "actors.rollout_worker",
)
_COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")

# Without the site module it takes 15 ms. Lengths before contents: the message is larger than a socket's buffer.
_SCRIPT = """#!{python} -IS
import json, os, socket, sys
context = [a for a in sys.argv[1:] if a.startswith("--serialized-runtime-env-context=")]
own = json.loads(context[0].partition("=")[2] or "{{}}") if context else {{}}
env = own.get("env_vars") or {{}}
worker = [i for i, argument in enumerate(sys.argv) if argument.endswith("default_worker.py")]
plain = own.get("py_executable") in (None, {python!r}) and not own.get("command_prefix")
server = socket.socket(socket.AF_UNIX)
try:
    if not (worker and plain and {threads!r} in (None, env.get("OMP_NUM_THREADS")) and "PYTHONPATH" not in env):
        raise OSError
    server.connect({address!r})
except OSError:
    server.close()
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
message = json.dumps({{
    "argv": [a for a in sys.argv[worker[0]:] if not a.startswith(("--serialized-runtime-env-context=", "--language="))],
    "env": {{**os.environ, **env}},
    "cwd": os.getcwd(),
}}).encode()
socket.send_fds(server, [len(message).to_bytes(8, "big")], [0, 1, 2])
server.sendall(message)
server.recv(1)  # the worker holds the other end
"""


@contextlib.contextmanager
def forked_workers(cfg: Config) -> Iterator[Path | None]:
    """The interpreter for the workers of a local Ray; None where they are not to be forked: the Ray is another one, or
    a role computes on a GPU, whose driver does not survive a fork."""
    roles = [cfg.rollout.resources, cfg.learner.resources, *(reward.resources for reward in cfg.rewards.values())]
    if cluster_address(cfg.ray.address) is not None or any(resources.get("GPU") for resources in roles):
        yield None
        return
    env = actor_env(cfg.learner.threads or cores())  # glibc and OpenMP read it when the process starts
    modules = [*_LIBRARIES, *(_COMPILER if cfg.generator.compile else ())]
    with fork_server(modules, env, env["OMP_NUM_THREADS"]) as script:
        yield script


@contextlib.contextmanager
def fork_server(modules: Sequence[str], env: Mapping[str, str], threads: str | None) -> Iterator[Path]:
    """The interpreter for workers that are forked from a process with `modules` imported, and with the variables `env`.
    `threads`: the OMP_NUM_THREADS of those that are; None: any."""
    with tempfile.TemporaryDirectory(prefix="rushes-", dir="/tmp") as folder:  # a socket's path has at most 107 bytes
        script, address = Path(folder) / "python", Path(folder) / "fork"
        script.write_text(_SCRIPT.format(python=sys.executable, address=str(address), threads=threads))
        script.chmod(0o755)
        command = [sys.executable, "-m", "jobs.cluster.forked_workers", str(address), *modules]
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **env, "PYTHONPATH": path},
            start_new_session=True,  # else a terminal's Ctrl-C ends the workers before the run is saved
        ) as server:
            try:
                yield script
            finally:
                assert server.stdin is not None  # the server ends with its input
                server.stdin.close()


def _next_worker(listening: socket.socket) -> tuple[dict[str, Any], socket.socket, list[int]]:
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


def serve(address: str, modules: list[str]) -> None:
    """Imports the modules, and those of the actors, then forks the workers that are asked for, and becomes a worker in
    each fork."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        for name in modules:
            importlib.import_module(name)
        worker, connection, files = _next_worker(listening)
        os.environ.update(worker["env"])  # but for threads, which are equal, all that matters is a run's
        for name in _ACTORS:
            importlib.import_module(name)
        gc.freeze()  # else the first collection in a worker copies all of it
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # an ended worker is gone at once
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
        while os.fork() > 0:
            for file in (connection.detach(), *files):
                os.close(file)
            worker, connection, files = _next_worker(listening)
    os.setpgid(0, 0)  # when a worker ends, Ray ends all of its process group
    connection.detach()  # closed when this process ends
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    serve(sys.argv[1], sys.argv[2:])
