"""One process writes a run; the system frees the lock of one that is killed."""

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest

from jobs.cluster.runs import FolderRun
from pipeline.core.errors import ConfigError, RushesError
from pipeline.runs.lock import RunLock, this_process, writer_of, writing_process
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


def test_readers_never_refuse_a_writers_start(tmp_path):
    """However many look at the run, and however often the writer starts."""
    run, done = RunDir(tmp_path), threading.Event()

    def look() -> None:
        while not done.is_set():
            writer_of(run)

    readers = [threading.Thread(target=look) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(60):
            with RunLock(run):
                assert writer_of(run) == this_process()  # its own look does not free its lock
                with pytest.raises(RushesError), RunLock(run):
                    pass
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert writer_of(run) is None


@pytest.mark.parametrize(
    "text", ["process 1 on {host}", "process {other} on {host}", "process 99999999 on {host}", "x"]
)
def test_a_lock_file_may_name_any_process_but_only_the_writer_counts(tmp_path, text):
    """A run's folder may be shared or copied: what `rushes stop` would signal has the lock itself open."""
    run = RunDir(tmp_path)
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with RunLock(run):
            assert writing_process(run).pid == os.getpid()
            run.lock.write_text(text.format(host=os.uname().nodename, other=bystander.pid))
            assert writing_process(run) is None
            with pytest.raises(ConfigError, match="is no process of this machine and user"):
                FolderRun(run).stop(now=False)
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n")
