"""`rushes export`: a checkpoint of a run as a LoRA in several key styles, or as a whole folder, with a model card."""

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
    format_: Annotated[
        str | None,
        typer.Option("--format", help="lora, kohya, comfyui or full; default: lora, or full if that was trained."),
    ] = None,
    ema: Ema = True,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the folder.")] = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint for other programs, with a card.

    lora: for diffusers and PEFT. kohya, comfyui: one LoRA file in the key style that kohya's scripts, A1111 and Forge,
    or ComfyUI read. full: a whole diffusers folder.

    \b
    Examples:
      rushes export runs/try
      rushes export runs/try --format comfyui
      rushes export runs/try --step 50 --format full --out my-generator
    """
    from jobs.common.load_trained import find_trained
    from pipeline.generators.checkpoint_files import STYLES
    from pipeline.generators.export_folder import check_replaceable, copy_line, load_lines
    from pipeline.tools import preflight
    from pipeline.tools.model_card import write_card

    console = make_console()
    trained = find_trained(run, step)
    if trained.kind != "checkpoint":
        raise InputError(f"{run}: is an export already; give the run's folder")
    cfg = trained.run_config
    format_ = format_ or cfg.trainable.kind
    formats = ("lora", *STYLES, "full")
    if format_ not in formats:
        raise ConfigError(
            f"--format: found {show(format_)}; expected {', '.join(formats[:-1])} or full; diffusers and PEFT read lora"
        )
    if format_ != "full" and cfg.trainable.kind == "full":
        raise ConfigError(f"--format {format_}: this run trained all weights, there is no LoRA; use --format full")
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
        from pipeline.generators import export as exports
        from pipeline.runs.trained_weights import read_weights

        weights = read_weights(trained.path, cfg.trainable.kind, ema)
        if format_ in STYLES:
            exports.export_styled(cfg, weights, folder, format_)
        else:
            (exports.export_lora if format_ == "lora" else exports.export_full)(cfg, weights, folder)
        write_card(trained.path.parent.parent, folder, cfg, trained.step or 0)
    say(console, f"step {trained.step} exported to {folder}; {folder / 'README.md'} is its model card")
    if format_ in STYLES:
        say(console, copy_line(folder))
        return
    say(console, "in plain diffusers:")
    base = cfg.generator.pretrained if format_ == "lora" else folder
    say(console, f'    pipe = DiffusionPipeline.from_pretrained("{base}")')
    for line in load_lines(folder, str(folder)):
        say(console, f"    {line}")
