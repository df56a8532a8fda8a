"""`rushes generate`: takes of a prompt or a prompt file as png / mp4, with the deterministic ODE sampler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common.load_trained import find_trained, load_policy
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.core.media import save_takes
from pipeline.core.prompts import check_prompt_lengths, load_prompts
from pipeline.core.types import PromptItem
from pipeline.rl.group_plan import eval_works
from pipeline.tools import preflight

if TYPE_CHECKING:
    from rich.console import Console


def generate(
    cfg: Config,
    *,
    texts: list[str],
    prompts_file: Path | None,
    checkpoint: Path | None,
    out: Path,
    takes: int,
    seed: int,
    steps: int | None,
    ema: bool,
    console: Console,
) -> int:
    """Writes media and `takes.parquet` into `out`. The same seed, prompt and take give the same file."""
    if bool(texts) == (prompts_file is not None):
        raise ConfigError('generate: give either --prompt "some text" (may be repeated) or --prompts FILE')
    prompts = load_prompts(prompts_file) if prompts_file else [_item(i, text) for i, text in enumerate(texts)]
    if (out / "takes.parquet").exists():
        raise ConfigError(f"--out {out}: holds takes already; choose another folder")
    preflight.check_devices(cfg)
    preflight.check_generator(cfg, [], [])
    check_prompt_lengths(prompts, cfg.generator.pretrained, cfg.generator.call_kwargs, prompts_file)
    preflight.check_writable(out, "--out")
    trained = find_trained(checkpoint) if checkpoint else None

    with console.status("loading the generator"):
        policy = load_policy(cfg, trained, ema)
    evaluation = cfg.evaluation.model_copy(
        update={"prompts": 0, "takes_per_prompt": takes, "seed": seed, "steps": steps or cfg.evaluation.steps}
    )
    works = eval_works(cfg.model_copy(update={"evaluation": evaluation}), prompts, step=0)
    from rich.progress import track

    version = trained.step or 0 if trained else 0
    for work in track(works, description="generating", console=console, disable=not console.is_terminal):
        media, _, _ = policy.rollout(work)
        save_takes(out, media, work.prompts, work.seeds, version, {})
    count = sum(work.takes for work in works)
    console.print(
        f"{count} take{'s' if count != 1 else ''} in {out}, listed in {out / 'takes.parquet'}", soft_wrap=True
    )
    return 0


def _item(index: int, text: str) -> PromptItem:
    if not text.strip():
        raise ConfigError("--prompt: is empty; give a text")
    return PromptItem(index=index, text=text)
