"""`rushes fit-reward`: a reward that prefers what people prefer, from a table of labelled pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import Debug, make_console, say
from pipeline.core.errors import ConfigError


@command(Group.REWARDS)
def fit_reward(
    pairs: Annotated[Path, typer.Argument(metavar="PAIRS.parquet", help="Pairs labelled with the better one.")],
    base: Annotated[
        str,
        typer.Option("--base", help="A CLIP (a folder or a hub id), or a fitted reward to which raters are added."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder of the new reward.")],
    rater: Annotated[
        list[str] | None, typer.Option("--rater", help="Fit to this rater's answers alone; may be repeated.")
    ] = None,
    heads: Annotated[
        int,
        typer.Option("--heads", min=1, max=64, help="More than 1: raters differ; each mixes so many heads."),
    ] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures in one call of the CLIP.")] = 32,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:0.")] = "auto",
    debug: Debug = False,
) -> None:
    """Fit a reward to people's judgements of pairs.

    PAIRS.parquet is a table as `rushes label` and `rushes pairs` write it. A linear head on a frozen CLIP learns to
    prefer what people prefer (Bradley-Terry with ties). Printed is how well it does on prompts whose labels it has not
    seen. The reward is a folder, used by `scorer: fitted_clip`, also with gradients.

    \b
    Examples:
      rushes fit-reward takes/labels.parquet --base models/shapes-clip --out my-reward
      rushes fit-reward pairs.parquet --base openai/clip-vit-large-patch14 --out my-reward --rater ada
      rushes fit-reward all.parquet --base models/shapes-clip --out ours --heads 4
      rushes fit-reward cleo.parquet --base ours --out ours-and-cleo
      rushes agree pairs.parquet --reward fitted_clip --set fitted_clip.args.path=my-reward
    """
    import json

    from jobs.common.fit_report import card, print_fit, summarise_fit
    from jobs.common.fitting import fit_head, load_base
    from pipeline.core.files import atomic_write
    from pipeline.core.labelled_pairs import check_columns
    from pipeline.rewards.models.fitted_head import CARD, save_head
    from pipeline.tools import preflight

    check_columns(pairs)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ConfigError(f"--out {out}: is there already; choose another folder, so that each version is kept")
    preflight.check_writable(out, "--out")
    console = make_console()
    with console.status("loading the CLIP"):
        loaded = load_base(base, heads, device, batch)
    head, fitted, embedded, dropped = fit_head(pairs, loaded, rater or [], heads, console)
    report = summarise_fit(embedded, fitted, dropped)
    digest = save_head(out, head)
    atomic_write(out / "fit.json", json.dumps(report, indent=1).encode())
    atomic_write(out / CARD, card(report, head.config, digest, str(out), pairs.name).encode())
    print_fit(report, console)
    say(console, f"written to {out}, digest {digest}; use it as: scorer: fitted_clip, args: {{path: {out}}}")
