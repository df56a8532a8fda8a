"""`rushes push`: an export to a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, make_console, say


@command(Group.RUN)
def push(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, whose folder `export` is pushed, or the folder of an export.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the hub; made if it is not there.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Hub id of the base model, where it was trained from a local folder.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and show the model card only.")] = False,
    debug: Debug = False,
) -> None:
    """Upload an export with its model card to the hub.

    The token is HF_TOKEN, or that of `hf auth login`.

    \b
    Examples:
      rushes push runs/try my-name/my-model --dry-run
      rushes push runs/try my-name/my-model --private
      rushes push runs/try/exports/step-000050-comfyui my-name/my-lora
    """
    from jobs.common.hub_push import CARD, check_repo, export_files, hub_texts, upload
    from pipeline.runs.remote_sync import local_run

    check_repo(repo)
    if base is not None:
        check_repo(base)
    folder = local_run(run)
    folder = folder / "export" if (folder / "config.yaml").is_file() else folder
    files = export_files(folder)
    texts = hub_texts(folder, files, repo, base)
    console = make_console()
    total = sum(len(texts[name]) if name in texts else path.stat().st_size for name, path in files.items())
    say(console, f"{len(files)} files of {folder}, {total / 2**20:.1f} MiB, to {repo}:")
    for name, path in files.items():
        size = len(texts[name]) if name in texts else path.stat().st_size
        say(console, f"  {size:>14,}  {name}")
    if dry_run:
        say(console, f"\n{texts[CARD].decode()}")
        say(console, "nothing was uploaded (--dry-run)")
        return
    with console.status("uploading"):
        url = upload(repo, files, texts, private, f"{folder.parent.name}: model, card and takes")
    say(console, f"pushed: {url}")
