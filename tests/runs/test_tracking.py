"""Metrics files and trackers."""

import json
import sys
import types

import numpy as np
import pytest

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, RushesError
from pipeline.core.types import Media
from pipeline.runs.tracking import drop_metrics_since, make_tracker, media_grid, read_metrics


def config(*backends):
    return Config.model_validate(
        {
            "generator": {"pretrained": "x"},
            "prompts": {"train": "x.txt"},
            "rewards": {"j": {"scorer": "jpeg_compressibility"}},
            "tracking": {"backends": list(backends)},
        }
    )


def media(takes, frames):
    return Media(frames=np.zeros((takes, frames, 16, 16, 3), np.uint8), fps=8.0)


def test_jsonl_and_tensorboard(tmp_path):
    tracker = make_tracker(config("tensorboard"), tmp_path)
    tracker.log(0, {"reward/mean": np.float32(0.5)})
    tracker.log(1, {"reward/mean": 0.75, "loss": -1.0})
    tracker.log_media(1, "takes/x", media(3, 9))
    tracker.close()
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows] == [0, 1] and rows[1]["loss"] == -1.0 and rows[0]["time"] > 1e9
    events = list((tmp_path / "tensorboard").glob("events*"))
    assert len(events) == 1 and b"reward/mean" in events[0].read_bytes() and b"takes/x" in events[0].read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    tracker = make_tracker(config(), tmp_path)
    with pytest.raises(RushesError, match="step 3: loss = (nan|inf) is not finite"):
        tracker.log(3, {"ok": 1.0, "loss": value})
    assert read_metrics(tmp_path) == []


def test_resume_drops_later_lines_and_a_cut_one(tmp_path):
    tracker = make_tracker(config(), tmp_path)
    for step in range(5):
        tracker.log(step, {"x": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "x"')
    (tmp_path / "evals.jsonl").write_text('{"step": 0}\n{"step": 4}\n')
    assert drop_metrics_since(tmp_path, 3) == 3
    assert [r["x"] for r in read_metrics(tmp_path)] == [0, 1, 2]
    assert json.loads((tmp_path / "evals.jsonl").read_text()) == {"step": 0}


def test_media_grid():
    assert media_grid(media(1, 1)).shape[2] == 3
    pictures, strip = media_grid(media(4, 1)), media_grid(media(2, 9))
    assert pictures.shape[0] == pictures.shape[1]
    assert strip.shape[1] > 3 * strip.shape[0] and strip.dtype == np.uint8


def test_wandb_and_mlflow_get_the_same_calls(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def log(self, values, step):
            calls.append(("wandb", step, sorted(values)))

        def finish(self):
            calls.append(("wandb", "finish"))

    class Client:
        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return "1"

        def create_run(self, experiment, run_name):
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

        def log_metric(self, run, name, value, step):
            calls.append(("mlflow", run, name, value, step))

        def log_image(self, run, image, name):
            calls.append(("mlflow", name))

        def set_terminated(self, run):
            calls.append(("mlflow", "end"))

    wandb = types.SimpleNamespace(init=lambda **kw: calls.append(("init", kw["id"])) or Run(), Image=lambda a: a)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client))
    for _ in range(2):
        tracker = make_tracker(config("wandb", "mlflow"), tmp_path)
        tracker.log(1, {"x": 2.0})
        tracker.log_media(1, "takes", media(1, 1))
        tracker.close()
    assert [c for c in calls if c[0] == "init"] == [("init", None), ("init", "abc")]  # the second one resumes
    assert (
        ("wandb", 1, ["x"]) in calls
        and ("mlflow", "r", "x", 2.0, 1) in calls
        and ("mlflow", "takes-000001.png") in calls
    )


def test_a_backend_that_cannot_start_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="tracking.backends: wandb did not start"):
        make_tracker(config("wandb"), tmp_path)
