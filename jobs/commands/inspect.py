"""`rushes inspect`: whether a checkpoint can be trained as a policy; or the memory a config will take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug
from jobs.common.units import bytes_text
from pipeline.core.errors import ConfigError


@command(Group.LOOK)
def inspect(
    checkpoint: Annotated[
        list[str] | None,
        typer.Argument(metavar="CHECKPOINT", help="A diffusers folder or hub id; with --memory: KEY=VALUE overrides."),
    ] = None,
    memory: Annotated[
        Path | None, typer.Option("--memory", metavar="CONFIG", help="Estimate a config's memory per role instead.")
    ] = None,
    height: Annotated[int | None, typer.Option("--height", min=8, help="Pixels to probe with; default: small.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=8, help="Pixels to probe with; default: small.")] = None,
    num_frames: Annotated[int | None, typer.Option("--num-frames", min=1, help="Frames; default: few.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", min=0.0, help="Default: the pipeline's own.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Sampler steps whose noise levels are shown.")] = 10,
    call: Annotated[
        list[str] | None,
        typer.Option("--call", metavar="KEY=VALUE", help="Another argument of the pipeline (generator.call_kwargs)."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision.")] = None,
    pipeline: Annotated[str | None, typer.Option("--pipeline", help="Pipeline class, if not its own.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_out: Annotated[bool, typer.Option("--json", help="The whole report as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Check whether a checkpoint can be trained.

    Probes it as a policy: guidance, layout, samplers that fit, replay. The exit status is 0 only if it can be trained.
    With --memory, estimates the memory of every role of a config instead, without loading weights.

    \b
    Examples:
      rushes inspect models/shapes-image
      rushes inspect Wan-AI/Wan2.1-T2V-1.3B-Diffusers --num-frames 17 --json
      rushes inspect my-model --guidance-scale 1 --call max_sequence_length=128
      rushes inspect --memory configs/quickstart.yaml rollout.batch=4
    """
    import json

    if memory is not None:
        from jobs.common.memory_report import print_memory

        print_memory(memory, checkpoint or [], json_out=json_out)
        return
    if not checkpoint or len(checkpoint) > 1:
        raise ConfigError("inspect: give one checkpoint (a diffusers folder or hub id), or --memory CONFIG")
    from pipeline.tools.inspect_checkpoint import InspectOptions, inspect_checkpoint

    options = InspectOptions(
        revision=revision,
        pipeline=pipeline,
        height=height,
        width=width,
        num_frames=num_frames,
        guidance_scale=guidance_scale,
        steps=steps,
        call=_call_arguments(call or []),
        device=device,
    )
    report = inspect_checkpoint(checkpoint[0], options)
    print(json.dumps(report, indent=2) if json_out else as_text(report))
    raise typer.Exit(0 if report["trainable"] else 1)


def _call_arguments(options: list[str]) -> dict[str, Any]:
    from pipeline.core.reading import parse_yaml

    arguments = {}
    for option in options:
        key, separator, value = option.partition("=")
        if not separator:
            raise ConfigError(f"--call {option}: expected KEY=VALUE, such as --call max_sequence_length=128")
        arguments[key.strip()], _ = parse_yaml(value, f"--call {key}", ConfigError)
    return arguments


def as_text(report: dict[str, Any]) -> str:
    """The report as a page of text; its last line says whether the checkpoint can be trained."""
    lines = [f"{report['checkpoint']}: {report['pipeline']}", "", "Components"]
    for entry in report["components"]:
        size = f"{_count(entry['parameters'])} parameters, {entry['dtype']}" if entry.get("dtype") else ""
        lines.append(f"  {entry['name']:<18} {entry['class']:<36} {size}".rstrip())
    memory = ", ".join(f"{bytes_text(size)} {dtype}" for dtype, size in report["memory_bytes"].items())
    lines += ["", f"Weights in memory  {memory or 'none'}"]
    if "scheduler" in report:
        scheduler = report["scheduler"]
        swapped = "" if scheduler["checkpoint"] == scheduler["used"] else f", sampled with {scheduler['used']}"
        lines.append(
            f"Scheduler          {scheduler['checkpoint']}{swapped}; the model predicts {scheduler['prediction']}"
        )
        lines.append(f"Samplers that fit  {', '.join(report['samplers'])}")
    if report["trainable"]:
        probe, lora, probed_with = report["probe"], report["lora"], report["probed_with"]
        lines.append(f"Guidance           {report['guidance']} (reproduced to {probe['guidance_error']:.0e})")
        lines += [f"Layout             {report['layout'][0]}"] + [
            f"                   {w}" for w in report["layout"][1:]
        ]
        layers = ", ".join(f"{n} in {name}" for name, n in lora["layers"].items())
        lines.append(
            f"Trainable          LoRA of rank {lora['rank']}: {layers} linear layers, {_count(lora['parameters'])} "
            f"parameters; full: {_count(lora['full_parameters'])}"
        )
        lines.append(
            f"Ratio check        |log-ratio| of replayed steps: {probe['replay_whole']:.1e} together, "
            f"{probe['replay_single']:.1e} take by take"
        )
        frames = f" x {probed_with['num_frames']} frames" if probed_with["num_frames"] > 1 else ""
        pixels = f"{probed_with['height']} x {probed_with['width']} pixels"
        lines.append(
            f"Probed with        {pixels}{frames}, {probed_with['steps']} steps, batches of "
            f"{' and '.join(str(n) for n in probed_with['takes'])} takes, {report['seconds']} s"
        )
        lines += ["", *_step_lines(report["steps"]), "", "This checkpoint can be trained."]
    else:
        lines += ["", f"Cannot be trained: {report['reason']}"]
    return "\n".join(lines)


def _step_lines(report: dict[str, Any]) -> list[str]:
    """A line per sampler step but the last."""
    steps = report["steps"]
    lines = [
        f"Noise of {report['sampler']} {report['noise_level']:g} at {len(steps) + 1} steps",
        "  step  noise level       std     share of the gradient",
    ]
    for step in steps:
        levels = f"{step['sigma']:.3f} -> {step['sigma_next']:.3f}"
        share = f"{step['share']:7.1%}" if step["noisy"] else f"none by default: its noise stays ({step['share']:.0%})"
        lines.append(f"  {step['index']:<5} {levels:<16} {step['std']:6.4f}  {share}")
    return lines


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
