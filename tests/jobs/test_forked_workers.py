"""Workers of a local Ray are forked from a process that has the libraries imported."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil
import pytest
import ray
import tiny

from actors.ray_options import actor_env
from jobs.cluster.forked_workers import forked_workers
from jobs.cluster.ray_session import RaySession


def config(**sections):
    return tiny.config(Path("unused"), learner={"threads": 1}, ray={"address": "local"}, **sections)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_are_forked_with_their_own_environment_and_end_with_the_run():
    class Worker:  # sent by value: its process does not find this file
        def about(self) -> tuple[int, bool, str | None]:
            import sys

            return os.getpid(), "diffusers" in sys.modules, os.environ.get("MARK")

    cfg = config()
    with forked_workers(cfg) as python, RaySession(cfg, python=python):
        folder = python.parent
        about = []
        for mark, threads in (("one", 1), ("two", 1), ("three", 2)):
            env = {**actor_env(threads), "MARK": mark}
            actor = ray.remote(Worker).options(num_cpus=0.1, runtime_env={"env_vars": env}).remote()
            about.append((actor, *ray.get(actor.about.remote(), timeout=120)))
        assert [(forked, mark) for _, _, forked, mark in about] == [(True, "one"), (True, "two"), (False, "three")]
        pids = [pid for _, pid, _, _ in about]
        assert [os.getpgid(pid) for pid in pids[:2]] == pids[:2]  # Ray ends a worker's whole process group with it
        ray.kill(about[0][0])
        psutil.wait_procs([psutil.Process(pids[0])] if psutil.pid_exists(pids[0]) else [], timeout=30)
        assert not psutil.pid_exists(pids[0]) and psutil.pid_exists(pids[1])
    assert not folder.exists()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(30)
        assert not psutil.pid_exists(pid)


def test_workers_that_may_compute_on_a_gpu_are_not_forked(monkeypatch):
    with forked_workers(config(rollout={"resources": {"GPU": 1}})) as python:
        assert python is None
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with forked_workers(tiny.config(Path("unused"), ray={"address": "auto"})) as python:
        assert python is None
