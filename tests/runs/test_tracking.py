"""Metrics files and trackers."""

import io
import json
import struct
import sys
import time
import types

import numpy as np
import pytest

from pipeline.config.schema import Config
from pipeline.core.errors import RushesError
from pipeline.core.types import Media, TakeCaption
from pipeline.runs import tracking
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


def test_takes_have_captions_and_clips_play(tmp_path, monkeypatch):
    """W&B gets mp4 and pictures; TensorBoard pictures and GIFs, entitled with the prompt, and the scores as text."""
    from PIL import Image
    from tensorboardX.proto.event_pb2 import Event

    calls = []
    shown = {kind: lambda data, kind=kind, **options: (kind, data, options) for kind in ("Image", "Video")}
    run = types.SimpleNamespace(id="a", log=lambda values, step: calls.append((step, values)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run, **shown))
    captions = [TakeCaption(prompt=f"prompt {k // 2}", scores={"scene": 0.25 * k}) for k in range(4)]
    frames = np.zeros((4, 5, 16, 24, 3), np.uint8) + 50 * np.arange(5, dtype=np.uint8).reshape(1, 5, 1, 1, 1)
    tracker = make_tracker(config("wandb", "tensorboard"), tmp_path)
    tracker.log_media(1, "heldout", Media(frames=frames, fps=8.0), captions)
    tracker.log_media(2, "pictures", media(1, 1))
    tracker.close()
    assert tracker.missing() == []
    (_, first), (_, second) = calls
    assert [(kind, options) for kind, _, options in first["heldout"]] == [
        ("Video", {"caption": f"prompt {k // 2}, scene {0.25 * k:.3f}", "format": "mp4"}) for k in range(4)
    ]
    assert first["heldout"][0][1].read()[4:8] == b"ftyp"
    assert [(kind, data.dtype) for kind, data, _ in second["pictures"]] == [("Image", np.uint8)]

    (file,) = (tmp_path / "tensorboard").glob("events*")
    data, values = file.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        for value in Event.FromString(data[12 : 12 + length]).summary.value:
            values[value.tag] = value
        data = data[16 + length :]
    assert {tag for tag in values if tag.startswith("heldout/0")} == {"heldout/00", "heldout/02"}  # one of each prompt
    assert values["heldout/02"].metadata.display_name == "heldout/02 prompt 1"
    clip = Image.open(io.BytesIO(values["heldout/02"].image.encoded_image_string))
    assert (clip.format, clip.n_frames, clip.info["duration"]) == ("GIF", 5, 120) and clip.width * 2 == clip.height * 3
    assert Image.open(io.BytesIO(values["pictures/00"].image.encoded_image_string)).format == "PNG"
    assert any(b"prompt 1, scene 0.750" in value.tensor.SerializeToString() for value in values.values())


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


def test_a_backend_that_cannot_be_imported_here_is_named_and_holds_up_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = make_tracker(config("wandb"), tmp_path)
    tracker.log(1, {"x": 1.0})
    tracker.close()
    assert len(read_metrics(tmp_path)) == 1
    (missing,), (warning,) = tracker.missing(), [record.getMessage() for record in caplog.records]
    assert "tracker wandb: 1 of 1 records are missing" in missing and "tracker wandb failed: ModuleNotFound" in warning


def test_a_resumed_run_hides_what_tensorboard_has_of_the_steps_it_repeats(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    tracker = make_tracker(config("tensorboard"), tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, {"x": 1.0})
    tracker.rewind(2)
    tracker.log(2, {"x": 2.0})
    tracker.close()
    starts = []
    for file in (tmp_path / "tensorboard").glob("events*"):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                starts.append(event.step)
    assert starts == [2] and tracker.missing() == []


class Client:
    """An MLflow client whose calls do as `behaviour(step)`."""

    calls: list = []

    def __init__(self, behaviour):
        self.behaviour = behaviour

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id="1")

    def create_run(self, experiment, run_name):
        self.behaviour("start")
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))

    def log_metric(self, run, name, value, step):
        self.behaviour(step)
        self.calls.append(step)

    def log_image(self, run, image, name):
        self.behaviour("image")

    def set_terminated(self, run):
        self.behaviour("end")


def fails(*moments, kind=ConnectionError):
    def behaviour(moment):
        if moment in moments:
            raise kind("http://mlflow:5000: max retries exceeded\nand more")

    return behaviour


def hangs(*moments):
    def behaviour(moment):
        if moment in moments:
            time.sleep(3600)

    return behaviour


@pytest.mark.parametrize(
    "behaviour, written, lost",
    [
        (fails(), [1, 2, 3], None),
        (fails(1), [2, 3], "1 of 4"),  # away, and back
        (fails(2, kind=SystemExit), [1, 3], "1 of 4"),
        (fails("start"), [], "4 of 4"),
        (fails("image"), [1, 2, 3], "1 of 4"),
        (fails("end"), [1, 2, 3], "0 of 4"),
        (hangs(2), [1], "3 of 4"),
        (hangs("start"), [], "4 of 4"),
        (hangs("end"), [1, 2, 3], "0 of 4"),
    ],
)
def test_a_tracker_that_fails_or_hangs_holds_up_nothing(behaviour, written, lost, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "CLOSE_S", 0.5)
    Client.calls = []
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=lambda: Client(behaviour)))
    started = time.monotonic()
    tracker = make_tracker(config("mlflow"), tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, {"x": 1.0})
    tracker.log_media(3, "takes", media(1, 1))
    tracker.close()
    assert time.monotonic() - started < 3
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3] and Client.calls == written
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if lost is None:
        assert tracker.missing() == [] and not warnings
    else:
        (missing,), (warning,) = tracker.missing(), warnings
        assert f"tracker mlflow: {lost} records are missing" in missing and "\n" not in missing + warning
        assert "tracker mlflow failed" in warning


def test_a_tracker_far_behind_is_left_behind(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "CLOSE_S", 0.2)
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=lambda: Client(hangs(1))))
    tracker = make_tracker(config("mlflow"), tmp_path)
    started = time.monotonic()
    for step in range(1, 200):
        tracker.log(step, {"x": 1.0})
    tracker.close()
    assert time.monotonic() - started < 3 and len(read_metrics(tmp_path)) == 199
    assert "199 of 199 records are missing (is more than 64 records behind)" in tracker.missing()[0]


def test_a_full_disk_ends_the_tensorboard_thread_and_not_the_run(tmp_path, monkeypatch):
    """tensorboardX writes in a thread of its own; once that has died, its `close` waits for ever."""
    from tensorboardX import event_file_writer

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking, "CLOSE_S", 1.0)
    monkeypatch.setattr(event_file_writer.EventsWriter, "write_event", full)
    monkeypatch.setattr(event_file_writer.EventsWriter, "_write_serialized_event", full, raising=False)
    tracker = make_tracker(config("tensorboard"), tmp_path)
    started = time.monotonic()
    for step in range(100):
        tracker.log(step, {"x": 1.0})
    tracker.close()
    assert time.monotonic() - started < 5 and len(read_metrics(tmp_path)) == 100
