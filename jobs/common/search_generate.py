"""`rushes generate --search`: a search's takes, table and page, in a folder that can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from jobs.common.options import say
from jobs.common.searching import SearchedTakes, TakeSearcher, Wanted, chunks
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.core.files import atomic_write
from pipeline.core.takes_table import TAKES_FILE, read_takes, save_takes
from pipeline.search.base import Search
from pipeline.search.page import write_page
from pipeline.search.record import SHOWN, append_rows, trace_rows

if TYPE_CHECKING:
    from rich.console import Console

OPTIONS = "search.yaml"


def check_search_folder(out: Path, search: Search, resume: bool) -> set[tuple[int, int]]:
    """(prompt index, seed) of the takes that a folder holds. Raises `ConfigError` where another search made them."""
    text = yaml.safe_dump(search.model_dump(mode="json"), sort_keys=False)
    if not (out / TAKES_FILE).exists():
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / OPTIONS, text.encode())
        return set()
    if not resume:
        raise ConfigError(
            f"--out {out}: already holds takes; add --resume to go on with them, or choose another folder"
        )
    before = (out / OPTIONS).read_text("utf-8") if (out / OPTIONS).exists() else ""
    if before != text:
        raise ConfigError(f"--out {out}: its takes were found by another search ({OPTIONS}); choose another folder")
    return {(row["prompt_index"], row["seed"]) for row in read_takes(out)}


def generate_by_search(
    cfg: Config, searcher: TakeSearcher, wanted: list[Wanted], out: Path, version: int, console: Console
) -> None:
    """Writes the takes. A chunk is written at once, so that those which an interrupted command lacks are whole chunks,
    and are found as if it had gone on."""
    from rich.progress import Progress

    search, steps = searcher.search, searcher.sampling.num_steps
    parts = chunks(cfg, search, wanted)
    calls, score, count = 0, 0.0, 0
    with Progress(console=console, disable=not console.is_terminal) as bar:
        line = bar.add_task("searching", total=len(wanted) * search.passes * steps)

        def progress(spent: int, best: float) -> None:
            bar.update(line, completed=calls + spent, description=f"searching, best so far {best:.3f}")

        for part in parts:
            result = searcher.find(part, pictures=count < SHOWN, progress=progress)
            write_chunk(result, out, version, cfg.reward_weights)
            calls += sum(task.trace.calls for task in result.tasks)
            score += sum(found.score for found in result.found)
            count += len(part)
    page = write_page(out, f"{search.name}, {search.passes} passes")
    if not count:
        return say(console, f"{out}: holds all of these takes already")
    text = f"{count} take{'s' if count != 1 else ''} in {out}: reward {score / count:.4f} on average"
    say(console, f"{text}, {calls / count / steps:.3g} passes each; the search is drawn in {page}")


def write_chunk(result: SearchedTakes, out: Path, version: int, weights: dict[str, float]) -> None:
    """The searches' rows come first, so that a take in takes.parquet is complete."""
    one_each = zip(result.wanted, result.tasks, result.found, strict=True)
    append_rows(out, [row for take, task, found in one_each for row in trace_rows(task, found, take.prompt)])
    prompts, seeds = [take.prompt for take in result.wanted], [take.seed for take in result.wanted]
    save_takes(out, result.media, prompts, seeds, version, result.scores, weights=weights)
