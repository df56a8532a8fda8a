"""A driver process that is ended by a signal: a checkpoint, one line that says how to resume, and no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ray_run import make_config, write_files

from pipeline.config.load import to_yaml
from pipeline.config.schema import Config
from pipeline.runs import checkpoint

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


DRIVER = """
import sys
from pathlib import Path
from jobs.launch.training import run_training
from pipeline.config.load import load_config
from pipeline.core.errors import RushesError
try:
    sys.exit(run_training(load_config(Path(sys.argv[1]), sys.argv[2:]), Path(sys.argv[1])))
except RushesError as error:
    print("error:", error, flush=True)
    sys.exit(error.exit_code)
"""


def start_driver(cfg: Config, folder: Path) -> subprocess.Popen:
    (folder / "job.yaml").write_text(to_yaml(cfg))
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder / "job.yaml"), "run.name=mine"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )


def test_sigterm_while_starting_is_a_proper_end(tiny_sd3, files, tmp_path):
    """Ray installs its own handler of SIGTERM in the middle of this."""
    driver = start_driver(make_config(tiny_sd3, files, tmp_path / "runs"), tmp_path)
    assert driver.stdout.readline().startswith("run ")
    time.sleep(2)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.terminate()
    output = driver.stdout.read()
    assert driver.wait(60) == 130, output
    assert "--resume run.name=mine" in output.splitlines()[-1] and "Traceback" not in output
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_ctrl_c_saves_says_how_to_go_on_and_leaves_nothing_running(tiny_sd3, files, tmp_path):
    cfg = make_config(tiny_sd3, files, tmp_path / "runs", "slow", run={"steps": 500}, checkpoint={"every": 0})
    driver = start_driver(cfg, tmp_path)
    lines = []
    for line in driver.stdout:
        lines.append(line)
        if line.startswith("step 2/"):
            break
    family = psutil.Process(driver.pid).children(recursive=True)
    assert family
    os.killpg(driver.pid, signal.SIGINT)  # what a terminal does
    lines += driver.stdout.readlines()
    assert driver.wait(60) == 130, "".join(lines)
    assert "--resume run.name=mine" in lines[-1] and "stopped at step" in lines[-1], "".join(lines)
    assert not any("Traceback" in line for line in lines)
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    folder = checkpoint.latest(tmp_path / "runs" / "mine" / "checkpoints")
    state = checkpoint.read_state(folder)["controller"]
    assert state["version"] == checkpoint.step_of(folder) >= 2 and state["evals"][0]["step"] == 0
