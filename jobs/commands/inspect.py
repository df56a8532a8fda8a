"""`rushes inspect CHECKPOINT`: what a checkpoint is as a policy, and whether it can be trained."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any


def inspect(
    checkpoint: str,
    *,
    revision: str | None = None,
    pipeline: str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    guidance_scale: float | None = None,
    call: dict[str, Any] | None = None,
    device: str = "auto",
    json_out: bool = False,
) -> int:
    """Prints the report. Returns 0 if the policy can be trained, else 1 after one line that says why not.

    Raises InputError when the checkpoint cannot be loaded.
    """
    warnings.simplefilter("ignore")
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from pipeline.tools.inspect_checkpoint import InspectOptions, inspect_checkpoint

    options = InspectOptions(
        revision=revision,
        pipeline=pipeline,
        height=height,
        width=width,
        num_frames=num_frames,
        guidance_scale=guidance_scale,
        call=call or {},
        device=device,
    )
    report = inspect_checkpoint(checkpoint, options)
    if json_out:
        print(json.dumps(report, indent=2))
    else:
        print(as_text(report))
    return 0 if report["trainable"] else 1


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['checkpoint']}: {report['pipeline']}", "", "Components"]
    for entry in report["components"]:
        size = f"{_count(entry['parameters'])} parameters, {entry['dtype']}" if entry.get("dtype") else ""
        lines.append(f"  {entry['name']:<18} {entry['class']:<36} {size}".rstrip())
    memory = ", ".join(f"{_bytes(size)} {dtype}" for dtype, size in report["memory_bytes"].items())
    lines += ["", f"Weights in memory  {memory or 'none'}"]
    if "scheduler" in report:
        scheduler = report["scheduler"]
        swapped = "" if scheduler["checkpoint"] == scheduler["used"] else f", sampled with {scheduler['used']}"
        lines.append(
            f"Scheduler          {scheduler['checkpoint']}{swapped}; the model predicts {scheduler['prediction']}"
        )
        lines.append(f"Samplers that fit  {', '.join(report['samplers'])}")
    if report["trainable"]:
        found, lora = report["probe"], report["lora"]
        at = report["probed_with"]
        lines.append(f"Guidance           {report['guidance']} (reproduced to {found['guidance_error']:.0e})")
        lines += [f"Layout             {report['layout'][0]}"] + [
            f"                   {w}" for w in report["layout"][1:]
        ]
        layers = ", ".join(f"{n} in {name}" for name, n in lora["layers"].items())
        lines.append(
            f"Trainable          LoRA of rank {lora['rank']}: {layers} linear layers, {_count(lora['parameters'])} "
            f"parameters; full: {_count(lora['full_parameters'])}"
        )
        lines.append(
            f"Ratio check        |log-ratio| of replayed steps: {found['replay_whole']:.1e} together, "
            f"{found['replay_single']:.1e} take by take"
        )
        frames = f" x {at['num_frames']} frames" if at["num_frames"] > 1 else ""
        lines.append(
            f"Probed with        {at['height']} x {at['width']} pixels{frames}, {at['steps']} steps, batches of "
            f"{' and '.join(str(n) for n in at['takes'])} takes, {report['seconds']} s"
        )
        lines += ["", "This checkpoint can be trained."]
    else:
        lines += ["", f"Cannot be trained: {report['reason']}"]
    return "\n".join(lines)


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
