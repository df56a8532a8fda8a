"""`rushes export`: a checkpoint of a run as a PEFT LoRA or a whole folder that plain diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common.load_trained import find_trained, quiet_libraries, read_weights
from pipeline.core.errors import ConfigError, InputError
from pipeline.tools import preflight

if TYPE_CHECKING:
    from rich.console import Console


def export(
    run: Path,
    *,
    out: Path | None,
    step: int | None,
    format_: str | None,
    ema: bool,
    force: bool,
    console: Console,
) -> int:
    """Raises `ConfigError` (format, existing folder), `InputError` (no run) or `CheckpointError`."""
    trained = find_trained(run, step)
    if trained.kind != "checkpoint":
        raise InputError(f"{run}: is an export already; give the run's folder")
    cfg = trained.run_config
    format_ = format_ or cfg.trainable.kind
    if format_ not in ("lora", "full"):
        raise ConfigError(f"--format: found {format_!r}; expected lora or full")
    if format_ == "lora" and cfg.trainable.kind == "full":
        raise ConfigError("--format lora: this run trained all weights, there is no LoRA; use --format full")
    folder = out or trained.path.parent.parent / "exports" / f"step-{trained.step:06d}-{format_}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file; choose another folder")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise ConfigError(f"--out {folder}: is not empty; choose another folder or add --force to replace it")
    preflight.check_writable(folder.parent, "--out")
    preflight.check_generator(cfg, [], [])

    with console.status("loading"):
        quiet_libraries()
        from pipeline.generators.export import export_full, export_lora

        weights = read_weights(trained, ema)
        (export_lora if format_ == "lora" else export_full)(cfg, weights, folder)
    console.print(f"step {trained.step} exported to {folder}; in plain diffusers:", soft_wrap=True)
    base = cfg.generator.pretrained if format_ == "lora" else folder
    console.print(f'    pipe = DiffusionPipeline.from_pretrained("{base}")', soft_wrap=True, highlight=False)
    if format_ == "lora" and any(path.is_dir() for path in folder.iterdir()):
        console.print(f"    {folder / 'README.md'} says how each component is loaded", soft_wrap=True, highlight=False)
    elif format_ == "lora":
        console.print(f'    pipe.load_lora_weights("{folder}")', soft_wrap=True, highlight=False)
    return 0
