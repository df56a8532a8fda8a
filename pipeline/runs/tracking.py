"""Where a run's metrics and media go: always to metrics.jsonl, and to TensorBoard, W&B or MLflow."""

from __future__ import annotations

import io
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.schema import Config
from pipeline.core.errors import RushesError
from pipeline.core.files import atomic_write, describe_os_error
from pipeline.core.media import encode_gif, encode_mp4, encode_png, enlarge, shrink, view_scale
from pipeline.core.secrets import mask_tree
from pipeline.core.types import Media, TakeCaption
from pipeline.runs.optional_tracker import CLOSE_S, OptionalTracker
from pipeline.runs.records import Position, StepRecord, read_records

METRICS_FILE = "metrics.jsonl"
MAX_STRIP_FRAMES = 8
GIF_PIXELS = 256  # longer side of the clips that TensorBoard gets
PROJECT = "rushes"  # W&B project or MLflow experiment, unless their own environment variables name one


class Tracker(ABC):
    """Where metrics go. `metrics` are finite floats by name (`ratio/max`), `step` counts optimisation steps."""

    @abstractmethod
    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_media(self, step: int, tag: str, media: Media, captions: Sequence[TakeCaption] = ()) -> None:
        """Takes, with a caption each or none. Trackers without media ignore it."""
        return

    def rewind(self, step: int) -> None:
        """The run has gone back: what was logged from `step` on is logged again. Trackers that overwrite ignore it."""
        return

    def close(self) -> None:
        """Flushes what is buffered."""
        return


def check_finite(step: int, metrics: dict[str, float]) -> None:
    """Raises `RushesError` naming the metric: a NaN means a broken step."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        values = ", ".join(f"{name} = {metrics[name]}" for name in bad[:4])
        raise RushesError(
            f"step {step}: {values} is not finite; lower optimizer.lr or check the reward (see docs/troubleshooting.md)"
        )


def media_grid(media: Media) -> np.ndarray:
    """uint8 [H, W, 3]: pictures in a near-square grid; of videos a row of up to 8 frames per take."""
    frames = enlarge(media.frames, max(1, view_scale(*media.frames.shape[2:4]) // 2))
    takes, count, height, width, _ = frames.shape
    if count > 1:
        chosen = np.unique(np.linspace(0, count - 1, min(count, MAX_STRIP_FRAMES)).round().astype(int))
        cells, columns = frames[:, chosen].reshape(-1, height, width, 3), len(chosen)
    else:
        cells, columns = frames[:, 0], math.ceil(math.sqrt(takes))
    rows = -(-len(cells) // columns)
    gap = 2
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, cell in enumerate(cells):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = cell
    return grid


class JsonlTracker(Tracker):
    """One line per step: {"step": n, "time": unix seconds, "<metric>": float, ...}."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **metrics}, allow_nan=False)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise RushesError(f"cannot write {describe_os_error(error, self.path)}") from error


class TensorBoardTracker(Tracker):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open(None)

    def _open(self, purge_step: int | None) -> None:
        """`purge_step`: TensorBoard hides what earlier files hold from this step on."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), flush_secs=10, purge_step=purge_step)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_media(self, step: int, tag: str, media: Media, captions: Sequence[TakeCaption] = ()) -> None:
        """A picture or a playing clip (GIF) per take, entitled with its prompt; the scores as a text of that step.

        Of clips the first take of each prompt: a GIF is many times as large as its mp4.
        """
        from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

        first_of_prompt = list({caption.prompt: k for k, caption in reversed(list(enumerate(captions)))}.values())
        clips = sorted(first_of_prompt) if captions else range(len(media.frames))
        for k in clips if media.frames.shape[1] > 1 else range(len(media.frames)):
            name, frames = f"{tag}/{k:02d}", media.frames[k]
            if len(frames) > 1:
                frames = np.stack([shrink(frame, GIF_PIXELS) for frame in frames])
                frames = enlarge(frames, view_scale(*frames.shape[1:3]))
                data = encode_gif(frames, media.fps)
            else:
                frames = enlarge(frames, view_scale(*frames.shape[1:3]))
                data = encode_png(frames[0])
            image = Summary.Image(
                height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=data
            )
            title = SummaryMetadata(display_name=f"{name} {captions[k].prompt}") if captions else None
            value = Summary.Value(tag=name, image=image, metadata=title)
            self._writer.file_writer.add_summary(Summary(value=[value]), step)
        if captions:
            text = "\n".join(f"* {k:02d} {caption}" for k, caption in enumerate(captions))
            self._writer.add_text(f"{tag}/scores", text, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker(Tracker):
    """Resumes the W&B run whose id is kept in the run folder."""

    def __init__(self, cfg: Config, run_dir: Path) -> None:
        import wandb

        file = run_dir / "wandb_id.txt"
        run_id = file.read_text().strip() if file.exists() else None
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(run_dir),
            config=mask_tree(cfg.model_dump(mode="json")),
        )
        file.write_text(self._run.id)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def log_media(self, step: int, tag: str, media: Media, captions: Sequence[TakeCaption] = ()) -> None:
        """A picture or an mp4 per take, with its caption."""
        shown = []
        for k, frames in enumerate(media.frames):
            caption = str(captions[k]) if captions else None
            if len(frames) > 1:
                clip = io.BytesIO(encode_mp4(frames, media.fps))
                shown.append(self._wandb.Video(clip, caption=caption, format="mp4"))
            else:
                picture = enlarge(frames, view_scale(*frames.shape[1:3]))[0]
                shown.append(self._wandb.Image(picture, caption=caption))
        self._run.log({tag: shown}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker(Tracker):
    """Continues the MLflow run whose id is kept in the run folder."""

    def __init__(self, cfg: Config, run_dir: Path) -> None:
        import mlflow

        file = run_dir / "mlflow_id.txt"
        self._client: Any = mlflow.MlflowClient()
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        existing = self._client.get_experiment_by_name(project)
        experiment = existing.experiment_id if existing else self._client.create_experiment(project)
        if file.exists():
            self._run = file.read_text().strip()
        else:
            self._run = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
            file.write_text(self._run)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._run, name, value, step=step)

    def log_media(self, step: int, tag: str, media: Media, captions: Sequence[TakeCaption] = ()) -> None:
        """One picture: a grid of pictures, or a strip of frames per clip. MLflow keeps no captions."""
        self._client.log_image(self._run, media_grid(media), f"{tag.replace('/', '_')}-{step:06d}.png")

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackers(Tracker):
    """metrics.jsonl, which the run needs, and trackers that may fail. Refuses values that are not finite before
    anything is written."""

    def __init__(self, metrics: JsonlTracker, optional: list[OptionalTracker]) -> None:
        self._metrics, self._optional = metrics, optional

    def log(self, step: int, metrics: dict[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        check_finite(step, values)
        for tracker in self._optional:
            tracker.log(step, values)
        self._metrics.log(step, values)

    def log_media(self, step: int, tag: str, media: Media, captions: Sequence[TakeCaption] = ()) -> None:
        for tracker in self._optional:
            tracker.log_media(step, tag, media, captions)

    def rewind(self, step: int) -> None:
        for tracker in self._optional:
            tracker.rewind(step)

    def close(self) -> None:
        """At most `CLOSE_S` seconds for all trackers together."""
        deadline = time.monotonic() + CLOSE_S
        for tracker in self._optional:
            tracker.close(within_s=max(0.1, deadline - time.monotonic()))

    def missing(self) -> list[str]:
        """A line for each tracker that did not get everything; after `close`."""
        return [line for tracker in self._optional if (line := tracker.missing()) is not None]


def make_tracker(cfg: Config, run_dir: Path) -> Trackers:
    """metrics.jsonl and the configured backends. One that cannot be imported here, is away or fails is a warning: the
    preflight checks have told whoever started the run if its package is not installed there."""
    run_dir = Path(run_dir)
    builders: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoardTracker(run_dir / "tensorboard"),
        "wandb": lambda: WandbTracker(cfg, run_dir),
        "mlflow": lambda: MlflowTracker(cfg, run_dir),
    }
    optional = [OptionalTracker(backend, builders[backend]) for backend in cfg.tracking.backends]
    return Trackers(JsonlTracker(run_dir / METRICS_FILE), optional)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, numbers by name; a last line cut off by a kill is left out. Raises `InputError`."""
    return read_records(Path(run_dir) / METRICS_FILE, StepRecord)


def drop_metrics_since(run_dir: Path, step: int) -> int:
    """Drops the lines of metrics.jsonl and evals.jsonl from `step` on, which a resumed run writes again. Returns their
    number."""
    dropped = 0
    for name in (METRICS_FILE, "evals.jsonl"):
        path = Path(run_dir) / name
        if not path.exists():
            continue
        rows = read_records(path, Position)
        kept = [row for row in rows if row["step"] < step]
        dropped += len(rows) - len(kept)
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    return dropped
