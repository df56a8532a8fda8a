"""One process writes a run; the system frees the lock of one that is killed."""

import multiprocessing

import pytest

from pipeline.core.errors import RushesError
from pipeline.runs.lock import RunLock, writer_of
from pipeline.runs.paths import RunDir


def _hold(path, ready, done):
    with RunLock(RunDir(path)):
        ready.set()
        done.wait(20)


def test_one_process_writes_a_run(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, done))
    process.start()
    assert ready.wait(20)
    with pytest.raises(RushesError, match=f"process {process.pid}"), RunLock(RunDir(tmp_path)):
        pass
    assert writer_of(RunDir(tmp_path)).startswith(f"process {process.pid} on ")
    process.kill()  # the system frees the lock of a killed process
    process.join()
    with RunLock(RunDir(tmp_path)):
        pass
    assert writer_of(RunDir(tmp_path)) is None
