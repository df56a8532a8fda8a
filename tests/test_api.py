"""`import rushes`: the few lines of the README, on tiny generators; and what the wheel carries."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rushes
from pipeline.config.load import load_config
from pipeline.core import shipped

ROOT = Path(__file__).parents[1]
SMALL = {"generator": {"compile": False}, "evaluation": {"steps": 2, "batch": 2}}


def test_a_few_lines_generate_and_score():
    takes = rushes.generate("configs/quickstart-image.yaml", ["a red circle"], takes=2, seed=3, **SMALL)
    assert [take.prompt for take in takes] == ["a red circle"] * 2 and takes[0].seed != takes[1].seed
    assert takes[0].frames.shape == (1, 48, 48, 3) and takes[0].frames.dtype == np.uint8
    again = rushes.generate("configs/quickstart-image.yaml", ["a red circle"], takes=2, seed=3, **SMALL)
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(takes, again, strict=True))
    scores = rushes.score(takes, ["scene", "jpeg_compressibility"])
    assert list(scores) == ["scene", "jpeg_compressibility"] and all(len(values) == 2 for values in scores.values())
    assert 0 <= scores["scene"][0] <= 1


def test_train_names_the_run_and_returns_it(tmp_path, monkeypatch):
    import jobs.launch.training

    seen = []

    def run_training(cfg, config):
        folder = cfg.run.dir / cfg.run.name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text('{"status": "finished"}')
        seen.append((cfg, config))
        return 0

    monkeypatch.setattr(jobs.launch.training, "run_training", run_training)
    run = rushes.train("configs/quickstart.yaml", run={"steps": 7, "dir": tmp_path}, objective={"name": "grpo"})
    [(cfg, config)] = seen
    assert cfg.run.steps == 7 and cfg.objective.name == "grpo" and run.path.parent == tmp_path
    assert run.path.name.startswith("quickstart-") and run.summary["status"] == "finished"
    assert run.config == run.path / "config.yaml" and config == Path("configs/quickstart.yaml")


def test_errors_are_those_of_the_commands():
    with pytest.raises(rushes.RushesError, match="run.stepps"):
        rushes.load_config("configs/quickstart.yaml", run={"stepps": 1})
    with pytest.raises(rushes.RushesError, match="the takes must have one shape"):
        rushes.score([], ["scene"])


def test_what_ships_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(Path("configs/methods/awm.yaml"))
    assert Path(cfg.generator.pretrained) == ROOT / "models/shapes-image"
    assert cfg.prompts.train == ROOT / "configs/prompts/image-train.txt"
    assert shipped.shipped_file(Path("configs/../pyproject.toml")) is None
    assert shipped.shipped_file(Path("pyproject.toml")) is None
    (tmp_path / "configs/prompts").mkdir(parents=True)
    (tmp_path / "configs/prompts/image-train.txt").write_text("mine\n")  # the user's own comes first
    assert load_config(Path("configs/methods/awm.yaml")).prompts.train == Path("configs/prompts/image-train.txt")


def test_every_name_is_documented():
    for name in rushes.__all__:
        assert inspect.getdoc(getattr(rushes, name)), name


def test_the_wheel_carries_what_ships(tmp_path):
    """Without the packing, which takes the time."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in ("configs", "models"):
        here = {path.relative_to(ROOT).as_posix() for path in (ROOT / name).rglob("*") if path.is_file()}
        there = {
            path.relative_to(tmp_path / "pipeline/shipped").as_posix()
            for path in tmp_path.rglob(f"shipped/{name}/**/*")
        }
        assert here <= there and len(here) > 10
    packed = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    for package in ("pipeline", "actors", "jobs"):
        files = {
            p.relative_to(ROOT).as_posix()
            for p in (ROOT / package).rglob("*")
            if p.suffix in (".py", ".yaml", ".j2", ".html")
        }
        assert files <= packed, files - packed
    assert "rushes.py" in packed
