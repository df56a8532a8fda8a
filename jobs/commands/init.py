"""`rushes init`: a commented config for a checkpoint, a reward and a card, with sizes that fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, make_console, say
from pipeline.core.errors import ConfigError
from pipeline.core.files import describe_os_error


@command(Group.RUN)
def init(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The config to write, such as my.yaml; never replaced.")],
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="diffusers folder or hub id.")] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", "-r", help="Scorer (`rushes score --list`), or file.py:function.")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option("--gpu-memory", min=0, help="GiB of the card; 0: train on the CPU.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Training prompts (.txt, .jsonl, .parquet).")
    ] = None,
    heldout: Annotated[Path | None, typer.Option("--heldout", help="Prompts to evaluate on.")] = None,
    height: Annotated[int, typer.Option("--height", min=8, help="Pixels.")] = 512,
    width: Annotated[int, typer.Option("--width", min=8, help="Pixels.")] = 512,
    frames: Annotated[int, typer.Option("--frames", min=1, help="Frames of a take; 1: pictures.")] = 1,
    debug: Debug = False,
) -> None:
    """Write a config to begin with.

    What is not given is asked for. Sizes (takes, batches, checkpointing, offload) are the largest of a few that fit the
    card by the estimate of `rushes inspect --memory`.

    \b
    Examples:
      rushes init my.yaml
      rushes init my.yaml --pretrained models/shapes-image -r scene --gpu-memory 0 --prompts prompts.txt --height 48 \\
        --width 48
    """
    from jobs.common.first_config import Wishes, first_config

    if out.exists():
        raise ConfigError(f"{out}: exists, and init replaces nothing; give another name")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}; make it first")
    console = make_console()
    wishes = Wishes(
        pretrained=pretrained or _ask("--pretrained", "Checkpoint (diffusers folder or hub id)"),
        reward=reward or _ask("--reward", "Reward (a scorer, or file.py:function)"),
        gpu_memory_gib=gpu_memory if gpu_memory is not None else _number("--gpu-memory", "GiB of the card (0: CPU)"),
        prompts=prompts or Path(_ask("--prompts", "File with training prompts")),
        heldout=heldout,
        height=height,
        width=width,
        num_frames=frames,
    )
    with console.status("looking for sizes that fit"):
        text, note = first_config(wishes, out)
    try:
        with open(out, "x", encoding="utf-8") as file:  # not a file that has come meanwhile
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {describe_os_error(error, out)}; give another name") from None
    say(console, f"{out} written: {note}")
    say(console, f"next: rushes train {out} --dry-run")


def _ask(option: str, question: str) -> str:
    if not sys.stdin.isatty():
        raise ConfigError(f"init: give {option}; there is no terminal to ask on")
    return str(typer.prompt(question))


def _number(option: str, question: str) -> float:
    text = _ask(option, question)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise ConfigError(f"{option}: found {text!r:.40}; expected GiB, such as 24, or 0 for the CPU")
    return value
