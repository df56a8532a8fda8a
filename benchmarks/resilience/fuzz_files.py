"""The areas of the fuzz that read files of other kinds: pictures and videos, checkpoints and LoRAs, run folders."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.resilience.fuzz import Case, rushes
from benchmarks.resilience.fuzz_areas import MODEL, good_config, write
from benchmarks.resilience.fuzz_inputs import JSON_TEXTS, changed_values, damaged

# ------------------------------------------------------------------------------------------------------- media


def media(work: Path, rng: random.Random) -> Iterator[Case]:
    from PIL import Image

    from pipeline.core.media import encode_mp4, read_media

    frames = rng.randbytes(9 * 48 * 64 * 3)
    pixels = np.frombuffer(frames, np.uint8).reshape(9, 48, 64, 3)
    good: dict[str, bytes] = {"mp4": encode_mp4(pixels, 8.0, scale=1)}
    for suffix, kind in (
        ("png", "PNG"),
        ("jpg", "JPEG"),
        ("gif", "GIF"),
        ("webp", "WEBP"),
        ("bmp", "BMP"),
        ("tiff", "TIFF"),
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels[0]).save(buffer, kind)
        good[suffix] = buffer.getvalue()

    def read(name: str, data: bytes) -> Callable[[], Any]:
        def call() -> None:
            result = read_media(write(work / name, data))
            assert result.frames.dtype == np.uint8 and result.frames.ndim == 5 and result.frames.shape[0] == 1
            assert result.frames.nbytes < 2**31 and 0 < result.fps < 1e6

        return call

    for suffix, data in good.items():
        for name, changed in damaged(data, rng, 30):
            yield Case(area="media", name=f"{suffix} {name}", run=read(f"m.{suffix}", changed))
        for other in good:
            yield Case(area="media", name=f"{suffix} named {other}", run=read(f"m.{other}", data))
    for number, data in enumerate(
        [b"", b"%!PS-Adobe\n", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\xff\xffWEBP", b"<svg/>"]
    ):
        for suffix in ("png", "mp4"):
            yield Case(area="media", name=f"head {number}.{suffix}", run=read(f"h.{suffix}", data), must_refuse=True)

    def special(kind: str, suffix: str) -> Callable[[], Any]:
        def call() -> Any:
            path = work / f"special.{suffix}"
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif path.is_symlink() or path.exists():
                path.unlink()
            if kind == "fifo":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            elif kind != "nothing":
                path.symlink_to(kind)
            return read_media(path)

        return call

    for kind in ("fifo", "folder", "nothing", "/dev/zero", "/dev/urandom", "/proc/self/mem", "/nowhere"):
        for suffix in ("png", "mp4"):
            yield Case(area="media", name=f"{kind} as {suffix}", run=special(kind, suffix), must_refuse=True)


# ------------------------------------------------------------------------------------------------- checkpoints


def checkpoints(work: Path, rng: random.Random) -> Iterator[Case]:
    """A run's checkpoint with damaged bytes, or other contents under a right manifest; LoRAs; diffusers folders."""
    import torch

    from jobs.common.load_trained import find_trained
    from pipeline.config.schema import Config
    from pipeline.generators.checkpoint_files import check_diffusers_folder
    from pipeline.runs import checkpoint

    cfg = Config.model_validate(good_config(work))
    source = checkpoint.save(work / "good", 3, {"weights/a": torch.ones(2, 3)}, {"version": 3}, {"version": 3}, cfg, 2)
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    target = work / "checkpoints" / "step-000003"

    def place(contents: dict[str, bytes]) -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name, data in contents.items():
            (target / name).write_bytes(data)

    def load(contents: dict[str, bytes]) -> Callable[[], Any]:
        def call() -> None:
            place(contents)
            checkpoint.load(target)
            checkpoint.check_config(target, cfg)
            checkpoint.newest(target.parent)

        return call

    def sealed(contents: dict[str, bytes]) -> dict[str, bytes]:
        entries = {name: data for name, data in contents.items() if name != checkpoint.MANIFEST}
        listed = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in entries.items()}
        manifest = {"format": checkpoint.FORMAT, "step": 3, "files": listed}
        return entries | {checkpoint.MANIFEST: json.dumps(manifest).encode()}

    for name, data in files.items():
        for what, changed in damaged(data, rng, 25):
            differs = changed != data and name != checkpoint.MANIFEST
            run = load(files | {name: changed})
            yield Case(area="checkpoints", name=f"{name} {what}", run=run, must_refuse=differs)
            if differs:
                yield Case(area="checkpoints", name=f"sealed {name} {what}", run=load(sealed(files | {name: changed})))
        if name.endswith(".json"):
            for what, value in changed_values(json.loads(data), rng, 25):
                contents = files | {name: json.dumps(value).encode()}
                contents = contents if name == checkpoint.MANIFEST else sealed(contents)
                yield Case(area="checkpoints", name=f"{name} {what}", run=load(contents))

    def find(folder: Path, contents: dict[str, bytes], look: Callable[[Path], Any]) -> Callable[[], Any]:
        def call() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            for name, data in contents.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
            look(folder)

        return call

    lora = {
        "pytorch_lora_weights.safetensors": files["tensors.safetensors"],
        "README.md": b"",
        "adapter_config.json": b"{}",
    }
    for what, changed in damaged(lora["pytorch_lora_weights.safetensors"], rng, 30):
        contents = lora | {"pytorch_lora_weights.safetensors": changed}
        yield Case(area="checkpoints", name=f"lora {what}", run=find(work / "lora", contents, find_trained))
    jsons = {
        str(file.relative_to(MODEL)): file.read_bytes()
        for file in MODEL.rglob("*.json")
        if "tokenizer" not in str(file)
    }
    folder = jsons | {
        str(file.relative_to(MODEL)): files["tensors.safetensors"] for file in MODEL.rglob("*.safetensors")
    }
    for name, data in jsons.items():
        for what, value in changed_values(json.loads(data), rng, 10):
            contents = folder | {name: json.dumps(value).encode()}
            yield Case(
                area="checkpoints", name=f"{name} {what}", run=find(work / "model", contents, check_diffusers_folder)
            )


# ------------------------------------------------------------------------------------------------- run folders


def run_folders(work: Path, rng: random.Random) -> Iterator[Case]:
    """What a run leaves behind, changed, under the commands that look at it."""
    from pipeline.config.load import to_yaml
    from pipeline.config.schema import Config
    from pipeline.core.takes_table import save_takes
    from pipeline.core.types import Media, PromptItem, RewardScores

    cfg = Config.model_validate(good_config(work))
    step = {"step": 1, "time": 1.0, "reward/mean": 0.5, "reward/std": 0.1, "reward/j": 0.5, "takes_per_s": 1.0}
    step |= {f"time/{name}": 1.0 for name in ("step", "rollout", "score", "learn", "sync")}
    estimate = {"mean": 0.5, "se": 0.1, "n": 2}
    evaluation = {"step": 0, "tag": "train", **estimate, "rewards": {"j": estimate}, "prompt_means": [0.4, 0.6]}
    heldout = {"before": estimate, "after": estimate, "difference": estimate, "rewards": {"j": {"before": estimate}}}
    summary = {"status": "finished", "heldout": heldout, "takes": 4, "groups": {"trained": 2}, "wall_s": 1.0}
    summary |= {"seeds": {"run": 0}, "versions": {"python": "3"}, "peak_rss_mb": 1.0}
    takes = work / "eval-takes"
    scores = {"j": RewardScores(values=np.ones(1, np.float32))}
    save_takes(
        takes,
        Media(frames=np.zeros((1, 1, 8, 8, 3), np.uint8), fps=8.0),
        [PromptItem(index=0, text="a")],
        [1],
        0,
        scores,
        step=0,
    )
    good = {
        "config.yaml": to_yaml(cfg).encode(),
        "metrics.jsonl": (json.dumps(step) + "\n").encode(),
        "evals.jsonl": (json.dumps(evaluation) + "\n").encode(),
        "summary.json": json.dumps(summary).encode(),
        "run.log": b"a line\n",
        **{f"eval/step-000000/{file.name}": file.read_bytes() for file in takes.iterdir()},
    }

    def look(command: list[str], contents: dict[str, bytes]) -> Callable[[], None]:
        def call() -> None:
            shutil.rmtree(work / "runs", ignore_errors=True)
            for run in ("r", "good"):
                for name, data in (contents if run == "r" else good).items():
                    (work / "runs" / run / name).parent.mkdir(parents=True, exist_ok=True)
                    (work / "runs" / run / name).write_bytes(data)
            rushes(*command)

        return call

    commands = [
        ["status", "runs/r"],
        ["list"],
        ["report", "runs/r"],
        ["size", "runs/r"],
        ["logs", "runs/r"],
        ["watch", "runs/r"],
    ]
    objects = {"metrics.jsonl": step, "evals.jsonl": evaluation, "summary.json": summary}
    changes: list[tuple[str, str, bytes]] = []
    for name, plain in objects.items():
        changes += [(name, what, json.dumps(value).encode() + b"\n") for what, value in changed_values(plain, rng, 30)]
        changes += [(name, text[:30], text.encode("utf-8", "surrogatepass")) for text in JSON_TEXTS]
    for name, data in good.items():
        changes += [(name, what, changed) for what, changed in damaged(data, rng, 12)]
    for name, what, data in changes:
        command = rng.choice(commands)
        run = look(command, good | {name: data})
        yield Case(area="run folders", name=f"{' '.join(command)}: {name} {what}", run=run)


AREAS = {"media": media, "checkpoints": checkpoints, "run folders": run_folders}
