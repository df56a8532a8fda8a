"""Which folder a run gets: unique names, one that exists is refused or resumed, and a retried job starts once."""

import io
import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
from rich.console import Console

import pipeline.tools.preflight
from jobs.launch import training
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.runs import checkpoint
from pipeline.runs.paths import RunDir
from pipeline.runs.resume import create, find_resumable, resume_or_create

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
    assert find_resumable(cfg, Path("x/c.yaml")).name == "c-20260101-000000"  # the newer one has no checkpoint
    with pytest.raises(ConfigError, match="no run 'nope'"):
        find_resumable(config(tmp_path, "nope"), Path("c.yaml"))
    with pytest.raises(ConfigError, match="no unfinished run"):
        find_resumable(cfg, Path("fresh.yaml"))


def test_a_retried_job_starts_its_run_once_and_then_resumes_it(tmp_path, monkeypatch):
    first, again = (resume_or_create(config(tmp_path, "mine"), Path("c.yaml")) for _ in range(2))
    assert (first.resumed, again.resumed) == (False, True)
    assert first.folder == again.folder == RunDir(tmp_path / "mine")
    with pytest.raises(ConfigError, match="run.name is not set"):
        resume_or_create(config(tmp_path), Path("c.yaml"))
    # retried after the run has finished: nothing is started, which would fail here
    monkeypatch.setattr(pipeline.tools.preflight, "check_all", lambda cfg: None)
    first.folder.summary.write_text(json.dumps({"status": "finished"}))
    checkpoint.save(first.folder.checkpoints, 100, {"weights/x": torch.zeros(1)}, {}, {}, config(tmp_path, "mine"), 1)
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
