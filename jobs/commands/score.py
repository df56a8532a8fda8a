"""`rushes score`: scores images and videos with any rewards, to parquet: one row per file and reward.

Columns: path, prompt, reward, score, error. A file that cannot be read, or a reward that fails on it, is a row with an
error and no score. Rows with a score for the same prompt are not computed again; rows with an error are tried again.
Nothing is lost when it is stopped: what is done is written every few seconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, InputError, RewardError, RushesError
from pipeline.core.files import atomic_write, describe_os_error
from pipeline.core.media import list_media, read_media
from pipeline.core.prompts import MAX_CHARACTERS
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.batching import Takes, score_groups
from pipeline.rewards.routing import KEY as ROUTING_KEY
from pipeline.rewards.runner import RewardRunner, build_reward
from pipeline.tools import preflight

if TYPE_CHECKING:
    from rich.console import Console

SAVE_EVERY_S = 5.0
BATCH = 16
BATCH_BYTES = 256 * 2**20  # of decoded frames: fewer files are scored together where they are large


@dataclass(frozen=True)
class Item:
    """One file to score; `name` is what goes into the column `path`. `error`: why it cannot be scored as it is."""

    name: str
    path: Path
    prompt: str
    metadata: dict[str, Any]
    error: str | None = None
    image: str | None = None  # the prompt's own picture: the source of an edit, a reference


def score(path: Path, *, rewards: list[RewardConfig], out: Path, prompt: str | None, console: Console) -> int:
    """Raises `RushesError` (exit 1) after writing everything when some rows failed."""
    names = [reward.scorer for reward in rewards]
    if not names:
        raise ConfigError("score: give at least one --reward NAME (`rushes score --list` shows them)")
    if len(set(names)) < len(names):
        raise ConfigError(f"--reward {max(names, key=names.count)}: is given twice; keep one")
    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: must end in .parquet")
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; give a file such as {out / 'scores.parquet'}")
    items = find_items(path, prompt)
    rows = read_scores(out)
    asked = {(item.name, item.prompt) for item in items}
    files = {item.name for item in items}
    # Scores of the same file under another prompt are out of date.
    rows = {key: row for key, row in rows.items() if key[0] not in files or key[:2] in asked}
    preflight.check_writable(out.parent, "--out")
    runners = {name: build_reward(name, cfg) for name, cfg in zip(names, rewards, strict=True)}
    skipped = score_items(items, runners, rows, out, console)

    wanted = [rows[item.name, item.prompt, name] for item in items for name in names]
    failed = [row for row in wanted if row["error"] is not None]
    _print(wanted, names, console, skipped)
    console.print(f"written to {out}", soft_wrap=True, highlight=False)
    if failed:
        raise RushesError(
            f"{len(failed)} of {len(wanted)} scores failed, the first: {failed[0]['error']}; "
            f"the others are in the column 'error' of {out}; mend the files and run the same command again"
        )
    return 0


def score_items(items: list[Item], runners: dict[str, RewardRunner], rows: Rows, out: Path, console: Console) -> int:
    """Adds what is missing to `rows` and writes them to `out`, also when it is stopped. Returns how many items had all
    their scores already. A failure is a row's `error`; only what is wrong with `out` is raised."""
    from rich.progress import Progress

    names = list(runners)
    done = {key for key, row in rows.items() if row["error"] is None}
    todo = [item for item in items if any((item.name, item.prompt, name) not in done for name in names)]

    last_save = time.monotonic()
    try:
        with Progress(console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("scoring", total=len(todo))
            for batch, unreadable in _batches(todo, rows, names, done):
                _score_batch(batch, runners, rows, done)
                progress.advance(bar, len(batch) + unreadable)
                if time.monotonic() - last_save > SAVE_EVERY_S:
                    write_scores(out, rows)
                    last_save = time.monotonic()
    finally:
        write_scores(out, rows)
    return len(items) - len(todo)


# ------------------------------------------------------------------------------------------------- what to score


def find_items(path: Path, prompt: str | None) -> list[Item]:
    """Files of a folder, one file, or the rows of a parquet with `path` (and `prompt`, `image`, `metadata`).
    `InputError`s."""
    if path.suffix == ".parquet":
        return _items_of_table(path, prompt)
    table = {}
    if path.is_dir() and (path / "takes.parquet").exists():  # what `rushes generate` writes
        table = {item.path: item for item in _items_of_table(path / "takes.parquet", None)}
    return [
        table[file] if file in table and prompt is None else _item_of_file(file, prompt) for file in list_media(path)
    ]


def _item_of_file(file: Path, prompt: str | None) -> Item:
    sidecar = file.with_suffix(".txt")
    if prompt is None and sidecar.is_file():
        try:
            prompt = sidecar.read_text("utf-8").strip()
        except UnicodeDecodeError:
            return Item(str(file), file, "", {}, f"{sidecar}: is not UTF-8 text; save the file as UTF-8")
        except OSError as error:
            return Item(str(file), file, "", {}, f"cannot read {describe_os_error(error, sidecar)}")
    return checked_item(str(file), file, prompt or "", None, str(sidecar))


def checked_item(
    name: str, path: Path, prompt: str, metadata: Any, where: str, image: Any = None, folder: Path = Path()
) -> Item:
    """`metadata`: a mapping or JSON text, or None. `where`: the source of the prompt, for the item's error. `image`:
    a path relative to `folder`, or None."""
    if len(prompt) > MAX_CHARACTERS:
        text = f"{where}: the prompt has {len(prompt):,} characters, the limit is {MAX_CHARACTERS:,}; shorten it"
        return Item(name, path, prompt[:80], {}, text)
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except json.JSONDecodeError as error:
            return Item(name, path, prompt, {}, f"{where}: metadata is not valid JSON ({error.msg})")
    if isinstance(metadata, list):  # a parquet map
        metadata = dict(metadata)
    if metadata is not None and not isinstance(metadata, dict):
        return Item(name, path, prompt, {}, f"{where}: metadata must be a mapping, found {metadata!r:.60}")
    if image is not None:
        file = folder / str(image)
        if not isinstance(image, str) or not file.is_file():
            text = f"{where}: image {image!r:.80} is not there; paths are relative to the table"
            return Item(name, path, prompt, {}, text)
        image = str(file.absolute())
    return Item(name, path, prompt, {k: v for k, v in (metadata or {}).items() if v is not None}, image=image)


def _items_of_table(table: Path, prompt: str | None) -> list[Item]:
    import pyarrow
    import pyarrow.parquet

    if not table.is_file():
        raise InputError(f"{table}: no such file")
    try:
        data = pyarrow.parquet.read_table(table)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{table}: cannot be read as parquet ({str(error).splitlines()[0][:120]}); write it again"
        ) from None
    if "path" not in data.column_names:
        raise InputError(
            f"{table}: has no column 'path' (columns: {', '.join(data.column_names)}); add one with the files"
        )
    items = []
    for number, row in enumerate(data.to_pylist(), start=1):
        if row["path"] is None:  # a take whose media was not kept
            continue
        text = prompt if prompt is not None else row.get("prompt") or ""
        if not isinstance(row["path"], str) or not isinstance(text, str):
            raise InputError(f"{table}, row {number}: 'path' and 'prompt' must be text")
        file = table.parent / row["path"]
        where = f"{table}, row {number}"
        items.append(checked_item(str(file), file, text, row.get("metadata"), where, row.get("image"), table.parent))
    if not items:
        raise InputError(f"{table}: lists no files; fill the column 'path'")
    return items


# -------------------------------------------------------------------------------------------------- the scoring


Batch = list[tuple[Item, Media]]
Rows = dict[tuple[str, str, str], dict[str, Any]]  # by path, prompt and reward


def _batches(todo: list[Item], rows: Rows, names: list[str], done: set) -> Iterator[tuple[Batch, int]]:
    """Consecutive files of one shape and rate, up to BATCH and BATCH_BYTES, and how many unreadable files became error
    rows on the way."""
    batch: Batch = []
    unreadable = 0
    for item in todo:
        try:
            if item.error is not None:
                raise InputError(item.error)
            media = read_media(item.path)
        except RushesError as error:
            for name in names:
                if (item.name, item.prompt, name) not in done:
                    _put(rows, item, name, None, str(error).replace(str(item.path), item.name))
            unreadable += 1
            continue
        full = len(batch) == BATCH or (len(batch) + 1) * media.frames.nbytes > BATCH_BYTES
        if batch and (full or _shape(batch[-1][1]) != _shape(media)):
            yield batch, unreadable
            batch, unreadable = [], 0
        batch.append((item, media))
    if batch or unreadable:
        yield batch, unreadable


def _shape(media: Media) -> tuple:
    return (*media.frames.shape[1:], media.fps)


def _score_batch(batch: Batch, runners: dict[str, RewardRunner], rows: Rows, done: set) -> None:
    for name, runner in runners.items():
        part = [entry for entry in batch if (entry[0].name, entry[0].prompt, name) not in done]
        if not part:
            continue
        needs = runner.scorer.needs_prompt
        ready = [i for i, (item, _) in enumerate(part) if item.prompt.strip() or not needs]
        outcomes = dict(zip(ready, score_groups(runner, [_takes(i, *part[i]) for i in ready]), strict=True))
        for i, (item, _) in enumerate(part):
            outcome = outcomes.get(i) or RewardError(
                f"reward {runner.name} compares with the prompt, which is empty; "
                "give --prompt, a column 'prompt' or NAME.txt"
            )
            if isinstance(outcome, RewardError):
                _put(rows, item, name, None, f"{item.name}: {outcome}")
            else:
                _put(rows, item, name, float(outcome.values[0]), None)
                done.add((item.name, item.prompt, name))


def _takes(index: int, item: Item, media: Media) -> Takes:
    # Which rewards a prompt is routed to is a training run's question; here they were asked for by name.
    metadata = {key: value for key, value in item.metadata.items() if key != ROUTING_KEY}
    prompt = PromptItem(index=index, text=item.prompt, image=item.image, metadata=metadata)
    return Takes(media, [prompt], None)


def _put(rows: Rows, item: Item, name: str, value: float | None, error: str | None) -> None:
    rows[item.name, item.prompt, name] = {
        "path": item.name,
        "prompt": item.prompt,
        "reward": name,
        "score": value,
        "error": error,
    }


# ----------------------------------------------------------------------------------------------------- the table


def read_scores(out: Path) -> Rows:
    """Rows of an earlier call; {} when there is none. Raises `InputError`."""
    import pyarrow
    import pyarrow.parquet

    if not out.exists():
        return {}
    try:
        rows = pyarrow.parquet.read_table(out).to_pylist()
        return {
            (row["path"], row["prompt"], row["reward"]): {
                k: row[k] for k in ("path", "prompt", "reward", "score", "error")
            }
            for row in rows
        }
    except (pyarrow.ArrowException, OSError, KeyError):
        raise InputError(
            f"--out {out}: exists but is not a table of scores; remove it or choose another file"
        ) from None


def write_scores(out: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [(name, pyarrow.string()) for name in ("path", "prompt", "reward")]
        + [("score", pyarrow.float64()), ("error", pyarrow.string())]
    )
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows.values()), schema=schema), buffer)
    atomic_write(out, buffer.getvalue().to_pybytes())


def _print(wanted: list[dict], names: list[str], console: Console, skipped: int) -> None:
    from rich.table import Table

    table = Table()
    for column in ("reward", "files", "mean", "std", "failed"):
        table.add_column(column, justify="left" if column == "reward" else "right", overflow="fold")
    for name in names:
        values = [row["score"] for row in wanted if row["reward"] == name and row["error"] is None]
        count = sum(row["reward"] == name for row in wanted)
        mean, std = (f"{np.mean(values):.4f}", f"{np.std(values):.4f}") if values else ("–", "–")
        table.add_row(name, str(count), mean, std, str(count - len(values)))
    console.print(table)
    if skipped:
        console.print(f"{skipped} files had all their scores already")
