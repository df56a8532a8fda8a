"""Memory of every role of a run, from its config alone (`rushes inspect --memory CONFIG`): measures what the imported
libraries take, estimates the rest (`pipeline.tools.memory.estimate`), and prints both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs.common.units import bytes_text
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.errors import RushesError
from pipeline.rl.group_plan import SHOWN_PROMPTS

# What a process of each role imports, and a small computation that makes the libraries allocate their buffers.
_TORCH = """
import torch
torch.set_num_threads(1)
x = torch.randn(2, 8, 64, 64, requires_grad=True)
y = torch.nn.functional.conv2d(x, torch.randn(8, 8, 3, 3)).flatten(1) @ torch.randn(30752, 64)
torch.nn.functional.scaled_dot_product_attention(*[y.reshape(2, 1, 8, 8)] * 3).sum().backward()
"""
_IMPORTS = {
    "rollout": "import actors.rollout_worker, pipeline.generators.policy, diffusers, transformers\n"
    "from diffusers import {pipeline}" + _TORCH,
    "learner": "import actors.learner_rank, pipeline.learner.learner, pipeline.generators.export, diffusers\n"
    "from diffusers import {pipeline}" + _TORCH,
    "reward": "import actors.reward_server\nfrom pipeline.rewards.registry import scorer_class\n"
    "for name in {scorers}: scorer_class(name)",
    # The controller writes the shown takes, and its memory grows with their size.
    "controller": """
import tempfile, numpy, actors.controller, actors.train_loop, torch
from pathlib import Path
from pipeline.core.takes_table import save_takes
from pipeline.runs.tracking import TensorBoardTracker
from pipeline.core.types import Media, PromptItem
shape = ({shown}, {frames}, {height}, {width}, 3)
media = Media(frames=numpy.random.default_rng(0).integers(256, size=shape, dtype=numpy.uint8), fps=8.0)
with tempfile.TemporaryDirectory() as folder:
    prompts = [PromptItem(index=i, text="a take") for i in range(len(media.frames))]
    keep = [prompt.index == 0 for prompt in prompts]
    save_takes(Path(folder), media, prompts, [0] * len(prompts), 0, {}, keep=keep)
    if "tensorboard" in {trackers}:
        tracker = TensorBoardTracker(Path(folder))
        tracker.log_media(0, "takes", media)
        tracker.close()
""",
}
# Not ru_maxrss, which a new process inherits from its parent.
_PEAK = """
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"): print(int(line.split()[1]) * 1024)
"""
_RAY_WORKER = 35 * 2**20  # what Ray's worker holds beyond `import ray`: measured with Ray 2.60, idle worker


def print_memory(config: Path, overrides: list[str], *, json_out: bool) -> None:
    """Prints the estimate. `overrides`: KEY=VALUE, or a checkpoint that takes the place of the config's."""
    given = [entry if "=" in entry else f"generator.pretrained={entry}" for entry in overrides]
    cfg = load_config(config, given)
    from pipeline.tools.memory.estimate import estimate_memory
    from pipeline.tools.memory.meta_pipeline import pipeline_name

    estimate = estimate_memory(cfg, bases(cfg, pipeline_name(cfg.generator)))
    print(json.dumps(estimate, indent=2) if json_out else as_text(estimate))


def bases(cfg: Config, pipeline: str) -> dict[str, int]:
    """Role -> bytes of a process that has imported the role's libraries, each measured in a fresh process."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(_IMPORTS, pool.map(lambda role: base(role, cfg, pipeline), _IMPORTS), strict=True))


def base(role: str, cfg: Config, pipeline: str) -> int:
    """The same for one role. Raises RushesError where its libraries cannot be imported."""
    generator = cfg.generator
    values = {
        "pipeline": pipeline,
        "scorers": repr([r.scorer for r in cfg.rewards.values() if ":" not in r.scorer]),
        "trackers": repr(list(cfg.tracking.backends)),
        "shown": str(shown_takes(cfg)),
        "frames": str(generator.num_frames),
        "height": str(generator.height),
        "width": str(generator.width),
    }
    code = _IMPORTS[role] + _PEAK
    for name, value in values.items():
        code = code.replace("{" + name + "}", value)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    if done.returncode:
        raise RushesError(f"the libraries of the role {role} cannot be imported: {done.stderr.strip()[-200:]}")
    return int(done.stdout.split()[-1]) + _RAY_WORKER


def shown_takes(cfg: Config) -> int:
    """Held-out takes that the controller holds at once, for the report and the trackers."""
    prompts = min(SHOWN_PROMPTS, cfg.evaluation.prompts or SHOWN_PROMPTS)
    return max(1, prompts * cfg.evaluation.takes_per_prompt)


def as_text(estimate: dict[str, Any]) -> str:
    """The estimate as a page of text."""
    lines = [f"Memory planned for {estimate['generator']}, before any weights are loaded", ""]
    for name, role in estimate["roles"].items():
        where = "in main memory" if role["on"] == "cpu" else "on the accelerator"
        many = f" x {role['processes']}" if role["processes"] > 1 else ""
        device = f", {bytes_text(role['device_bytes'])} on the accelerator" if role["device_bytes"] else ""
        lines.append(f"{name}{many}: {bytes_text(role['host_bytes'])} in main memory{device}")
        lines += [f"    {bytes_text(size):>10}  {part}" for part, size in role["parts"].items() if size > 0]
        if role["on"] != "cpu":
            lines.append(f"                (weights to activations are {where}; its own context is not counted)")
    store = estimate["object_store"]
    over = "" if store["bytes"] <= store["limit"] else "  <- too small: raise ray.init.object_store_memory"
    lines.append(f"object store: {bytes_text(store['bytes'])} of {bytes_text(store['limit'])}{over}")
    lines += [f"    {bytes_text(size):>10}  {part}" for part, size in store["parts"].items() if size]
    lines += ["", f"together: {bytes_text(estimate['host_bytes'])} in main memory"]
    if estimate["device_bytes"]:
        lines[-1] += f", {bytes_text(estimate['device_bytes'])} on accelerators"
    return "\n".join(lines)
