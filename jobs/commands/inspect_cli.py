"""`rushes inspect`: its options. The work is in `jobs.commands.inspect` (a checkpoint) and `jobs.common.memory_report`
(a config's memory)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.common.options import Debug
from pipeline.core.errors import ConfigError


def inspect(
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="CHECKPOINT", help="A diffusers folder or hub id; with --plan: KEY=VALUE overrides."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="CONFIG", help="Estimate a config's memory per role instead.")
    ] = None,
    height: Annotated[int | None, typer.Option("--height", min=8, help="Pixels to probe with; default: small.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=8, help="Pixels to probe with; default: small.")] = None,
    num_frames: Annotated[int | None, typer.Option("--num-frames", min=1, help="Frames; default: few.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", min=0.0, help="Default: the pipeline's own.")
    ] = None,
    call: Annotated[
        list[str] | None,
        typer.Option(
            "--call", metavar="KEY=VALUE", help="A further argument of the pipeline, as in generator.call_kwargs."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision.")] = None,
    pipeline: Annotated[str | None, typer.Option("--pipeline", help="Pipeline class, if not its own.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_out: Annotated[bool, typer.Option("--json", help="The whole report as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint is as a policy; exit 0 only if it can be trained. --plan: a config's memory, no weights.

    \b
    Examples:
      rushes inspect models/shapes-image
      rushes inspect Wan-AI/Wan2.1-T2V-1.3B-Diffusers --num-frames 17 --json
      rushes inspect my-model --guidance-scale 1 --call max_sequence_length=128
      rushes inspect --plan configs/quickstart.yaml rollout.batch=4
    """
    if plan is not None:
        from jobs.common.memory_report import plan as estimate

        raise typer.Exit(estimate(plan, what or [], json_out=json_out))
    if not what or len(what) > 1:
        raise ConfigError("inspect: give one checkpoint (a diffusers folder or hub id), or --plan CONFIG")
    from jobs.commands.inspect import inspect as run

    raise typer.Exit(
        run(
            what[0],
            revision=revision,
            pipeline=pipeline,
            height=height,
            width=width,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
            call=_arguments(call or []),
            device=device,
            json_out=json_out,
        )
    )


def _arguments(options: list[str]) -> dict[str, Any]:
    import yaml

    given = {}
    for option in options:
        key, mark, value = option.partition("=")
        if not mark:
            raise ConfigError(f"--call {option}: expected KEY=VALUE, such as --call max_sequence_length=128")
        given[key.strip()] = yaml.safe_load(value)
    return given
