"""How the roles share a card: the learner sharded over NCCL, and a whole run of Ray actors."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.card import Card
from benchmarks.gpu.group import measure_group
from benchmarks.gpu.shapes import SIZES, TINY, config, save_checkpoint
from benchmarks.learning.samples import ROOT
from pipeline.learner.distributed import join, listen
from pipeline.runs.paths import RunDir


def sharded(card: Card) -> dict[str, Any]:
    """The SD3.5-medium shape with a LoRA and with all weights: as one process, and as one rank of FSDP2."""
    opened = listen("127.0.0.1")
    rank = join(0, 1, ("127.0.0.1", opened.getsockname()[1]), torch.device(card.device), listening=opened)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        shape = (TINY if card.tiny else SIZES)["sd3.5-medium"]
        save_checkpoint("sd3.5-medium", shape, Path(scratch))
        for kind in ("lora", "full"):
            less = {"step": {"takes": 4}, "sampler": {"steps": 4}, "rollout": {"merge_lora": False}}
            cfg = config(Path(scratch), shape, trainable={"kind": kind}, **less)
            for name, distributed in (("one process", None), ("one rank", rank)):
                found[f"{kind}, {name}"] = measure_group(cfg, card, distributed).numbers
                card.free()
            found[f"{kind}, slower as a rank"] = (
                found[f"{kind}, one rank"]["learn_s"] / found[f"{kind}, one process"]["learn_s"]
            )
    return found


def whole_run(card: Card) -> dict[str, Any]:
    """Three steps of the image quickstart with all its actors; on a GPU the roles share the card."""
    overrides = ["run.name=gpu-check", "run.steps=3", "evaluation.prompts=8", "learner.replicas=1"]
    overrides += ["generator.compile=false", "rollout.workers=1"]
    if card.is_gpu:
        overrides += ["rollout.resources={CPU: 1, GPU: 0.5}", "learner.resources={CPU: 1, GPU: 0.5}"]
    if card.tiny:
        overrides += ["step.groups=2", "step.takes=4"]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "jobs.cli", "train", "configs/quickstart-image.yaml", f"run.dir={scratch}"]
        began = time.monotonic()
        run = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True)
        seconds = time.monotonic() - began
        if run.returncode:
            raise RuntimeError(f"exit status {run.returncode}: {(run.stdout + run.stderr)[-2000:]}")
        paths = RunDir(Path(scratch) / "gpu-check")
        steps = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    timed = [name for name in steps[-1] if name.startswith("time/")]
    return {
        "command": " ".join(["rushes train configs/quickstart-image.yaml", *overrides]),
        "run_s": seconds,
        "process_died": "died" in run.stdout + run.stderr,
        "steps": [{name: row[name] for name in timed} for row in steps],
    }
