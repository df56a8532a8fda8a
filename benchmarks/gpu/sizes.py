"""Models in the shapes of real ones: takes per second, utilisation, memory against the plan, and what each switch does.

Utilisation: floating-point operations of the denoiser that a step needs, per second, as a share of what this card does
in a large bfloat16 matrix product. A backward pass counts twice its forward pass; under activation checkpointing the
second forward pass is not counted, since it is no work that the step needs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.card import GIB, Card
from benchmarks.gpu.group import bare_passes, measure_group
from benchmarks.gpu.shapes import SIZES, TINY, config, save_checkpoint
from pipeline.config.schema import Config
from pipeline.core.errors import one_line
from pipeline.tools.memory.estimate import estimate_memory


def size(name: str, card: Card, compiled: bool = False) -> dict[str, Any]:
    """Rollout and update of one group of the model `name`."""
    with tempfile.TemporaryDirectory() as scratch:
        cfg = _checkpoint(name, card, Path(scratch), generator={"compile": compiled})
        group = measure_group(cfg, card)
        planned = _planned(cfg)
    numbers = group.numbers
    bare = bare_passes(group, card)
    part_share = numbers["takes"] / bare["takes"]
    work, trained = cfg.sampler.steps, len(group.trajectory.sampling.trained_steps)
    peak = card.matmul_tflops()
    result = {
        **numbers,
        "takes_per_s_rollout": numbers["takes"] / numbers["rollout_s"],
        "takes_per_s_in_turn": numbers["takes"] / (numbers["rollout_s"] + numbers["learn_s"]),
        "bare": bare,
        "bare_share_rollout": part_share * work * bare["forward_s"] / numbers["rollout_s"],
        "bare_share_learn": part_share * trained * bare["forward_backward_s"] / numbers["learn_s"],
        "matmul_bf16_tflops": peak,
        "mfu_rollout": part_share * work * bare["forward_tflop"] / numbers["rollout_s"] / peak,
        "mfu_learn": 3 * part_share * trained * bare["forward_tflop"] / numbers["learn_s"] / peak,
        "planned_gib": planned,
    }
    for role in ("rollout", "learner"):
        if card.is_gpu:
            result[f"{role}_peak_over_plan"] = numbers[f"{role}_peak_gib"] / planned[role]
    return result


def _checkpoint(name: str, card: Card, folder: Path, **sections: dict[str, Any]) -> Config:
    shape = (TINY if card.tiny else SIZES)[name]
    save_checkpoint(name, shape, folder)
    return config(folder, shape, **sections)


def _planned(cfg: Config) -> dict[str, float]:
    """GiB on the device by role, as `rushes inspect --memory` says."""
    roles = estimate_memory(cfg, dict.fromkeys(("rollout", "learner", "reward", "controller"), 0))["roles"]
    return {role: (roles[role]["device_bytes"] or roles[role]["host_bytes"]) / GIB for role in ("rollout", "learner")}


# What a switch changes in the config. `baseline` is measured first and last, so that the card's own drift shows.
SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "baseline": {},
    "no activation checkpointing": {"learner": {"activation_checkpointing": False}},
    "float16": {"generator": {"dtype": "float16"}, "learner": {"autocast": "float16"}},
    "float32": {"generator": {"dtype": "float32"}, "learner": {"autocast": "none"}},
    "offload idle": {"generator": {"offload": "idle"}},
    "offload group": {"generator": {"offload": "group"}},
    "not merged": {"rollout": {"merge_lora": False}},
    "not merged, int8": {"generator": {"quantize": "int8"}, "rollout": {"merge_lora": False}},
    "compile": {"generator": {"compile": True}},
    "baseline again": {},
}
_NUMBERS = ("rollout_s", "learn_s", "rollout_peak_gib", "learner_peak_gib", "replay")


def switches(card: Card) -> dict[str, Any]:
    """The SD3.5-medium shape with one thing changed at a time: seconds and memory as ratios to the baseline."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cfg = _checkpoint("sd3.5-medium", card, Path(scratch), step={"takes": 4}, sampler={"steps": 4})
        for name, changed in SWITCHES.items():
            try:
                numbers = measure_group(_changed(cfg, changed), card).numbers
                found[name] = {key: numbers[key] for key in _NUMBERS if key in numbers}
            except Exception as error:  # a switch that fails here is a result
                found[name] = {"failed": f"{type(error).__name__}: {one_line(error, 300)}"}
            card.free()
    base = found["baseline"]
    for row in found.values():
        for key in _NUMBERS[:4]:
            if row.get(key) and base.get(key):
                row[f"{key} ratio"] = row[key] / base[key]
    return found


def _changed(cfg: Config, sections: dict[str, dict[str, Any]]) -> Config:
    plain = cfg.model_dump(mode="json", exclude_unset=True)
    for name, keys in sections.items():
        plain[name] = {**plain.get(name, {}), **keys}
    return Config.model_validate(plain)
