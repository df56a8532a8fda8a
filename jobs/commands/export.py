"""`rushes export`: a checkpoint of a run as a PEFT LoRA or a whole folder that plain diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, Ema, make_console, say
from pipeline.config.messages import show
from pipeline.core.errors import ConfigError, InputError


@command(Group.RUN)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, or one of its checkpoints.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write; default: RUN/exports/step-N-FORMAT.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="Checkpoint of this step; default: the newest.")
    ] = None,
    format_: Annotated[str | None, typer.Option("--format", help="lora or full; default: what was trained.")] = None,
    ema: Ema = True,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the folder.")] = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint in a format that plain diffusers loads.

    \b
    Examples:
      rushes export runs/try
      rushes export runs/try --step 50 --format full --out my-generator
    """
    from jobs.common.load_trained import find_trained
    from pipeline.generators.export_folder import check_replaceable
    from pipeline.tools import preflight

    console = make_console()
    trained = find_trained(run, step)
    if trained.kind != "checkpoint":
        raise InputError(f"{run}: is an export already; give the run's folder")
    cfg = trained.run_config
    format_ = format_ or cfg.trainable.kind
    if format_ not in ("lora", "full"):
        raise ConfigError(f"--format: found {show(format_)}; expected lora or full")
    if format_ == "lora" and cfg.trainable.kind == "full":
        raise ConfigError("--format lora: this run trained all weights, there is no LoRA; use --format full")
    folder = out or trained.path.parent.parent / "exports" / f"step-{trained.step:06d}-{format_}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file; choose another folder")
    if folder.exists() and any(folder.iterdir()):
        if not force:
            raise ConfigError(f"--out {folder}: is not empty; choose another folder or add --force to replace it")
        check_replaceable(folder, "--out", [trained.path, Path(cfg.generator.pretrained).expanduser()])
    preflight.check_writable(folder.parent, "--out")
    preflight.check_generator(cfg, [], [])

    with console.status("loading"):
        from pipeline.generators.export import export_full, export_lora
        from pipeline.runs.trained_weights import read_weights

        weights = read_weights(trained.path, cfg.trainable.kind, ema)
        (export_lora if format_ == "lora" else export_full)(cfg, weights, folder)
    say(console, f"step {trained.step} exported to {folder}; in plain diffusers:")
    base = cfg.generator.pretrained if format_ == "lora" else folder
    say(console, f'    pipe = DiffusionPipeline.from_pretrained("{base}")')
    if format_ == "lora" and any(path.is_dir() for path in folder.iterdir()):
        say(console, f"    {folder / 'README.md'} says how each component is loaded")
    elif format_ == "lora":
        say(console, f'    pipe.load_lora_weights("{folder}")')
