"""Runs on a real local Ray: their config, rewards, and what they leave behind."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import ray
import tiny

from actors.controller import Controller
from actors.ray_errors import root
from actors.ray_options import RunContext
from jobs.cluster.run_api import controller_options
from pipeline.config.schema import Config
from pipeline.core.errors import RushesError
from pipeline.runs import checkpoint
from pipeline.runs.paths import RunDir

TIMED = ("time", "queue/", "workers/", "takes_per_s", "retries")


REWARDS = """
import time
import numpy as np

def brightness(frames, prompts):
    return frames.reshape(len(prompts), -1).mean(1) / 255

def slow(frames, prompts):
    time.sleep(0.2)
    return brightness(frames, prompts)

def broken(frames, prompts):
    raise ZeroDivisionError("the scorer's own words")

def flat(frames, prompts):
    return np.zeros(len(prompts))

for function in (brightness, slow, broken, flat):
    function.batched = True
"""


def write_files(folder: Path) -> Path:
    """Prompt sets and the rewards above, for `make_config`."""
    (folder / "train.txt").write_text("a red circle\nb blue square\nc green circle\na blue circle\nb red square\n")
    (folder / "heldout.txt").write_text("c red square\na green square\nb green circle\nc blue circle\n")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def make_config(sd3: Path, files: Path, runs: Path, reward: str = "brightness", **sections) -> Config:
    base = {
        "run": {"dir": str(runs), "steps": 2},
        "prompts": {"train": str(files / "train.txt"), "heldout": str(files / "heldout.txt")},
        # running statistics are in every checkpoint: a resumed run must continue with them
        "rewards": {"own": {"scorer": f"{files / 'rewards.py'}:{reward}", "normalize": "running"}},
        "evaluation": {"prompts": 4, "steps": 3, "batch": 2},
        "optimizer": {"lr": 1e-2, "ema_decay": 0.9},
        "checkpoint": {"every": 1, "keep": 9},
        "tracking": {"backends": []},
        "ray": {"address": "local", "init": {"num_cpus": 8, "object_store_memory": 200 * 2**20}},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    cfg = tiny.config(sd3, **base)
    return cfg.model_copy(update={"rewards": {"own": cfg.rewards.pop("own")}})


class Run:
    """A controller and its run folder."""

    def __init__(self, cfg: Config, name: str, resume_from: Path | None = None) -> None:
        self.dir = RunDir(cfg.run.dir / name)
        self.dir.path.mkdir(parents=True, exist_ok=True)
        self.cfg = cfg
        ctx = RunContext(cfg=cfg, run_path=str(self.dir.path), cwd=os.getcwd())
        start = str(resume_from) if resume_from else None
        options = controller_options(self.dir, life=2 if start else 1)
        self.controller = ray.remote(Controller).options(num_cpus=0, **options).remote(ctx, start)
        self.ended = self.controller.run.remote()

    def result(self, timeout: float = 300) -> dict:
        return ray.get(self.ended, timeout=timeout)

    def failure(self) -> RushesError:
        with pytest.raises(ray.exceptions.RayError) as error:
            self.result()
        return root(error.value)

    def until(self, condition, timeout: float = 240) -> dict:
        limit = time.monotonic() + timeout
        while time.monotonic() < limit:
            snapshot = ray.get(self.controller.progress.remote(0))
            if condition(snapshot):
                return snapshot
            time.sleep(0.01)
        raise AssertionError(f"never came true; last: {snapshot}")

    def metrics(self) -> list[dict]:
        lines = [json.loads(line) for line in self.dir.metrics.read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]

    def evals(self) -> list[dict]:
        return [json.loads(line) for line in self.dir.evals.read_text().splitlines()]

    def tensors(self, step: int):
        return checkpoint.load(checkpoint.folder_of(self.dir.checkpoints, step))[0]
