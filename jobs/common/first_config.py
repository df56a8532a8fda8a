"""The text of a first config, and the search for sizes that fit: `rushes init`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipeline.config.load import validate
from pipeline.config.messages import Source
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, RushesError, one_line
from pipeline.core.shipped import shipped_root
from pipeline.rl.samplers import get_sampler

ROOM = 0.85  # share of the card, or of the machine's memory, that the estimate may fill


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user said."""

    pretrained: str
    reward: str
    gpu_memory_gib: float  # 0: the CPU
    prompts: Path
    heldout: Path | None
    height: int
    width: int
    num_frames: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What decides how much memory a run takes, from generous to small."""

    takes: int
    batch: int
    micro_batch: int
    activation_checkpointing: bool = False
    offload: str = "none"


SIZES = (
    Sizes(takes=16, batch=16, micro_batch=8),
    Sizes(takes=16, batch=8, micro_batch=4),
    Sizes(takes=12, batch=4, micro_batch=2, activation_checkpointing=True),
    Sizes(takes=8, batch=2, micro_batch=1, activation_checkpointing=True),
    Sizes(takes=8, batch=1, micro_batch=1, activation_checkpointing=True, offload="idle"),
)


def first_config(wishes: Wishes, out: Path) -> tuple[str, str]:
    """(the YAML text, a line on how its sizes were chosen). Raises ConfigError for wishes that no config can hold, and
    where even the smallest sizes do not fit."""
    from pipeline.tools.memory.estimate import estimate_memory

    smallest = ""
    for sizes in SIZES:
        text = _text(wishes, sizes)
        config = _checked(text, out)
        try:
            found = estimate_memory(config, dict.fromkeys(("rollout", "learner", "reward", "controller"), 2**29))
        except RushesError as error:
            text = _text(wishes, SIZES[-2])
            _checked(text, out)
            return text, f"small sizes, not checked against the memory ({one_line(error, 160)})"
        used, limit = _used(wishes, found)
        smallest = f"{used / 2**30:.1f} of {limit / 2**30:.1f} GiB"
        if used <= ROOM * limit:
            where = "the card" if wishes.gpu_memory_gib else "this machine"
            return text, f"sizes fit {where} by estimate ({smallest}); see: rushes inspect --memory {out}"
    raise ConfigError(
        f"--gpu-memory {wishes.gpu_memory_gib:g}: even the smallest sizes take {smallest} by estimate; use a smaller "
        "--height and --width, fewer --frames or a larger card"
    )


def _used(wishes: Wishes, estimate: dict[str, Any]) -> tuple[int, int]:
    """Bytes that the run takes, and those there are: on the card, or on the machine."""
    if wishes.gpu_memory_gib:
        return estimate["device_bytes"], int(wishes.gpu_memory_gib * 2**30)
    return estimate["host_bytes"], psutil.virtual_memory().total


def _checked(text: str, out: Path) -> Config:
    return validate(yaml.safe_load(text), Source(str(out)), base=out.parent)


def _has_unet(pretrained: str) -> bool:
    return (
        (Path(pretrained).expanduser() / "unet").is_dir() or "stable-diffusion-v1" in pretrained or "xl" in pretrained
    )


def _text(wishes: Wishes, sizes: Sizes) -> str:
    gpu = wishes.gpu_memory_gib > 0
    threads = 4 if gpu else max(1, (os.cpu_count() or 2) // 2)
    device = "auto" if gpu else "cpu"
    share = "resources: {CPU: 1, GPU: 0.5}" if gpu else "resources: {CPU: 1}"
    sampler = "ddim" if _has_unet(wishes.pretrained) else "flow_sde"
    heldout = (
        f"  heldout: {_quoted(str(wishes.heldout))} # evaluated before, during and after\n"
        if wishes.heldout
        else ("  # heldout: heldout.txt # prompts that are never trained on: without them a rise may be overfitting\n")
    )
    frames = f"  num_frames: {wishes.num_frames}\n  fps: 8\n" if wishes.num_frames > 1 else ""
    segments = ", segments: {count: 4}" if wishes.num_frames > 1 else ""
    schema = shipped_root() / "configs" / "schema.json"
    return f"""# yaml-language-server: $schema={schema}
# Made by `rushes init`. Check it: rushes train FILE --dry-run    All keys: rushes config --docs
run: {{steps: 100}} # seed, name and dir too
generator:
  pretrained: {_quoted(wishes.pretrained)} # a diffusers folder or hub id
  height: {wishes.height}
  width: {wishes.width}
{frames}  guidance_scale: 1.0 # classifier-free guidance in rollout and training; 1: none
  offload: {sizes.offload} # idle: models are on the card only while they run
trainable: {{kind: lora, rank: 16, alpha: 32}} # or kind: full
prompts:
  train: {_quoted(str(wishes.prompts))}
{heldout}sampler:
  kind: {sampler} # how rollouts draw noise (rushes inspect CHECKPOINT says which fit)
  noise_level: {get_sampler(sampler).default_noise}
  steps: 10
rewards:
  main: {{scorer: {_quoted(wishes.reward)}, weight: 1.0{segments}}} # several are summed by weight; rushes score --list
objective: {{name: grpo}} # docs/methods.md compares the others
step: {{groups: 8, takes: {sizes.takes}}} # a group: takes of one prompt, compared with each other
optimizer: {{lr: 1.0e-4}}
learner:
  device: {device}
  threads: {threads}
  micro_batch: {sizes.micro_batch} # takes in a forward and backward pass
  activation_checkpointing: {str(sizes.activation_checkpointing).lower()} # less memory, a third more time
  {share}
rollout: {{device: {device}, workers: 1, threads: {threads}, batch: {sizes.batch}, {share}}}
evaluation: {{every: 20, steps: 20, batch: {sizes.batch}}}
checkpoint: {{every: 20, keep: 2}}
"""


def _quoted(text: str) -> str:
    """A YAML scalar on one line."""
    return yaml.safe_dump(text, width=10**6, allow_unicode=True, default_style='"').strip()
