"""Run folders: unique names, which run --resume means, one writer at a time, log lines without secrets."""

import json
import logging
import multiprocessing
import os
from datetime import datetime
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, RushesError
from pipeline.runs import checkpoint
from pipeline.runs.paths import RunDir, RunLock, create, find_resumable, resume_or_create, setup_logging

NOW = datetime(2026, 11, 23, 15, 4, 5)


def config(folder: Path, name: str | None = None) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(folder), "name": name},
            "generator": {"pretrained": "models/x"},
            "prompts": {"train": "p.txt"},
            "rewards": {"r": {"scorer": "jpeg_compressibility"}},
        }
    )


def test_default_names_are_unique_and_named_ones_are_refused_twice(tmp_path):
    cfg = config(tmp_path / "runs")
    names = [create(cfg, Path("configs/my quick.yaml"), NOW).name for _ in range(3)]
    assert names == ["my-quick-20261123-150405", "my-quick-20261123-150405-2", "my-quick-20261123-150405-3"]
    named = config(tmp_path / "runs", "mine")
    create(named, Path("c.yaml"))
    with pytest.raises(ConfigError, match="--resume"):
        create(named, Path("c.yaml"))


@pytest.mark.parametrize("name", ["../up", "a/b", "", " ", ".hidden", "x" * 101])
def test_names_that_cannot_be_folders(tmp_path, name):
    if name:
        with pytest.raises(ConfigError, match="run.name"):
            create(config(tmp_path, name), Path("c.yaml"))


def test_resume_takes_the_newest_unfinished_run_of_this_config(tmp_path):
    mine = ["c-20260101-000000", "c-20260102-000000", "c-20260103-000000"]
    for name in [*mine, "c-video-20260109-000000", "other-20260108-000000"]:
        (tmp_path / name).mkdir()
    (tmp_path / "c-20260103-000000" / "summary.json").write_text(json.dumps({"status": "finished"}))
    (tmp_path / "c-20260102-000000" / "summary.json").write_text("{half")
    cfg = config(tmp_path)
    assert find_resumable(cfg, Path("x/c.yaml")).name == "c-20260102-000000"
    assert find_resumable(config(tmp_path, "other-20260108-000000"), Path("c.yaml")).name == "other-20260108-000000"
    saved = tmp_path / "c-20260101-000000" / "checkpoints" / "step-000001"
    saved.mkdir(parents=True)
    (saved / "MANIFEST.json").write_text("")
    assert find_resumable(cfg, Path("x/c.yaml")).name == "c-20260101-000000"  # the newer one has nothing to go on from
    with pytest.raises(ConfigError, match="no run 'nope'"):
        find_resumable(config(tmp_path, "nope"), Path("c.yaml"))
    with pytest.raises(ConfigError, match="no unfinished run"):
        find_resumable(cfg, Path("fresh.yaml"))


def test_a_retried_job_starts_its_run_once_and_then_goes_on(tmp_path, monkeypatch):
    import io

    from rich.console import Console

    import pipeline.tools.preflight
    from jobs.launch import training

    first, again = (resume_or_create(config(tmp_path, "mine"), Path("c.yaml")) for _ in range(2))
    assert (first[1], again[1]) == (False, True) and first[0] == again[0] == RunDir(tmp_path / "mine")
    with pytest.raises(ConfigError, match="run.name is not set"):
        resume_or_create(config(tmp_path), Path("c.yaml"))
    # one try too many: the run has finished, and nothing is started (which here would fail)
    monkeypatch.setattr(pipeline.tools.preflight, "check_all", lambda cfg: None)
    first[0].summary.write_text(json.dumps({"status": "finished"}))
    checkpoint.save(first[0].checkpoints, 100, {"weights/x": torch.zeros(1)}, {}, {}, config(tmp_path, "mine"), 1)
    output = io.StringIO()
    assert (
        training.run_training(config(tmp_path, "mine"), Path("c.yaml"), or_start=True, console=Console(file=output))
        == 0
    )
    assert "has finished all 100 steps" in output.getvalue().replace("\n", " ")


def test_the_folder_cannot_be_made(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match="run.dir: .* is a file"):
        create(config(tmp_path / "runs"), Path("c.yaml"))


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
    with pytest.raises(RushesError, match=f"process {process.pid}"):
        RunLock(RunDir(tmp_path)).acquire()
    process.kill()  # the system frees the lock of a killed process
    process.join()
    with RunLock(RunDir(tmp_path)):
        pass


def test_log_lines_name_their_place_and_hide_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdef0123456789")
    setup_logging(RunDir(tmp_path), "rollout", "rollout-1")
    log = logging.getLogger("rushes.test")
    log.info("made %d takes", 4, extra={"group": 17})
    try:
        raise ValueError("key abcdef0123456789 refused")
    except ValueError:
        log.exception("header %s", os.environ["WANDB_API_KEY"])
    text = (tmp_path / "run.log").read_text()
    assert f"run={tmp_path.name} role=rollout worker=rollout-1 group=17 rushes.test: made 4 takes" in text
    assert "group=- rushes.test: header ***" in text and "abcdef0123456789" not in text
    for handler in [h for h in logging.getLogger().handlers if h.name == "rushes run.log"]:
        logging.getLogger().removeHandler(handler)
        handler.close()
