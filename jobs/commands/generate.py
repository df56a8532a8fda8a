"""`rushes generate`: takes of a prompt or a prompts file as png or mp4, plain ones or the best that a search finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common.command import Group, command
from jobs.common.options import ConfigPath, Debug, Ema, Overrides, make_console, say
from pipeline.core.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.core.types import PromptItem


@command(Group.RUN)
def generate(
    config: ConfigPath,
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A prompts file (.txt, .jsonl, .parquet).")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", "-c", help="A run, one of its checkpoints, or an export; default: untrained."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the png or mp4 files and takes.parquet.")] = Path(
        "generated"
    ),
    takes: Annotated[int, typer.Option("--takes", min=1, help="Takes per prompt.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same takes.")] = 0,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Sampler steps; default: evaluation.steps.")
    ] = None,
    search: Annotated[
        str | None,
        typer.Option("--search", help="Search for better takes: best-of-n, fk, dts, dts-star, … or a YAML file."),
    ] = None,
    passes: Annotated[
        int | None, typer.Option("--passes", help="What a searched take may cost, in plain takes; default: 8.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the takes that an interrupted search has not written.")
    ] = False,
    ema: Ema = True,
    debug: Debug = False,
) -> None:
    """Sample images or videos from prompts.

    Uses the deterministic ODE sampler: the same prompt, seed and take give the same file. With --search, the rewards of
    the config steer, and every take costs --passes times as much.

    \b
    Examples:
      rushes generate configs/quickstart.yaml --prompt "a red circle moving left slowly" --takes 4
      rushes generate configs/quickstart.yaml --prompts my_prompts.txt --checkpoint runs/try --out after
      rushes generate configs/quickstart.yaml -p "two blue squares" -c runs/try/export generator.guidance_scale=3
      rushes generate configs/quickstart-image.yaml -p "two blue squares" --search fk --passes 16
    """
    from rich.progress import track

    from jobs.common.load_trained import find_trained, load_policy
    from jobs.common.search_generate import check_search_folder, generate_by_search
    from jobs.common.searching import TakeSearcher, read_search_option, rewards_of, takes_wanted
    from pipeline.config.load import load_config
    from pipeline.core.prompts import check_prompt_lengths, load_prompts
    from pipeline.core.takes_table import save_takes
    from pipeline.rl.group_plan import sample_works
    from pipeline.tools import preflight

    cfg, console = load_config(config, overrides or []), make_console()
    if bool(prompt) == (prompts is not None):
        raise ConfigError('generate: give either --prompt "some text" (may be repeated) or --prompts FILE')
    items = load_prompts(prompts) if prompts else [_prompt_item(i, text) for i, text in enumerate(prompt or [])]
    if search is None and (passes is not None or resume):
        raise ConfigError(f"generate: {'--resume' if resume else '--passes'} belongs to a search; add --search NAME")
    if search is None and (out / "takes.parquet").exists():
        raise ConfigError(f"--out {out}: already holds takes; choose another folder")
    chosen = read_search_option(cfg, search, passes) if search else None
    preflight.check_devices(cfg)
    preflight.check_generator(cfg, [], [])
    check_prompt_lengths(items, cfg.generator.pretrained, cfg.generator.call_kwargs, prompts)
    preflight.check_writable(out, "--out")
    trained = find_trained(checkpoint) if checkpoint else None
    there = check_search_folder(out, chosen, resume) if chosen else set()
    num_steps, version = steps or cfg.evaluation.steps, trained.step or 0 if trained else 0

    with console.status("loading the generator"):
        policy = load_policy(cfg, trained, ema)
    if chosen:
        searcher = TakeSearcher(policy, chosen, rewards_of(cfg), num_steps, items)
        wanted = [w for w in takes_wanted(cfg, items, takes, seed) if (w.prompt.index, w.seed) not in there]
        return generate_by_search(cfg, searcher, wanted, out, version, console)
    works = sample_works(cfg, items, takes, seed, num_steps)
    for work in track(works, description="generating", console=console, disable=not console.is_terminal):
        media, _, _ = policy.rollout(work)
        save_takes(out, media, work.prompts, work.seeds, version, {})
    count = sum(work.takes for work in works)
    say(console, f"{count} take{'s' if count != 1 else ''} in {out}, listed in {out / 'takes.parquet'}")


def _prompt_item(index: int, text: str) -> PromptItem:
    from pipeline.core.types import PromptItem

    if not text.strip():
        raise ConfigError("--prompt: is empty; give a text")
    return PromptItem(index=index, text=text)
