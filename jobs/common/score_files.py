"""Scores of image and video files, for `rushes score` and `rushes agree`: one row per file and reward.

Columns: path, prompt, reward, score, error. A file that cannot be read, or a reward that fails on it, is a row with an
error and no score. Rows with a score for the same prompt are kept; rows with an error are tried again. The table is
saved every few seconds, so an interrupted call loses little.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.core.errors import InputError, RewardError, RushesError
from pipeline.core.media import list_media, read_media
from pipeline.core.named_files import FIX, named_files, picture_file
from pipeline.core.parquet import columns_of, read_rows, write_parquet
from pipeline.core.prompts import MAX_CHARACTERS, read_metadata
from pipeline.core.reading import bad_text, read_text, storable
from pipeline.core.safe_paths import path_inside
from pipeline.core.secrets import mask
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.batching import Takes, score_groups
from pipeline.rewards.routing import KEY as ROUTING_KEY
from pipeline.rewards.runner import RewardRunner

if TYPE_CHECKING:
    from rich.console import Console

_TABLE_COLUMNS = ("path", "prompt", "image", "metadata")
_COPY = "a prompt lies beside its picture: copy the text there"
SAVE_EVERY_S = 5.0
BATCH = 16
BATCH_BYTES = 256 * 2**20  # of decoded frames; larger files are scored in smaller batches


@dataclass(frozen=True)
class Item:
    """One file to score; `name` goes into the column `path`. `error`: why it cannot be scored."""

    name: str
    path: Path
    prompt: str
    metadata: dict[str, Any]
    error: str | None = None
    image: str | None = None  # the prompt's own picture: the source of an edit, a reference
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)  # see `PromptItem.files`


class ScoreRow(BaseModel):
    """A row of the table."""

    model_config = ConfigDict(strict=True)

    path: str
    prompt: str
    reward: str
    score: float | None
    error: str | None


def score_items(items: list[Item], runners: dict[str, RewardRunner], rows: Rows, out: Path, console: Console) -> int:
    """Adds the missing scores to `rows` and writes them to `out`, also when interrupted. Returns how many items had all
    their scores already. A failure becomes a row's `error`; raises only when `out` cannot be written."""
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


# ------------------------------------------------------------------------------------------------- the files


def find_items(path: Path, prompt: str | None) -> list[Item]:
    """Files of a folder, one file, or the rows of a parquet with `path` (and `prompt`, `image`, `metadata`). Raises
    `InputError`."""
    if path.suffix == ".parquet":
        return _items_of_table(path, prompt)
    table = {}
    if path.is_dir() and (path / "takes.parquet").exists():  # what `rushes generate` writes
        table = {item.path: item for item in _items_of_table(path / "takes.parquet", None)}
    return [
        table[file] if file in table and prompt is None else _item_of_file(file, prompt, path)
        for file in list_media(path)
    ]


def _item_of_file(file: Path, prompt: str | None, root: Path) -> Item:
    sidecar, name = file.with_suffix(".txt"), storable(str(file))
    if problem := bad_text(str(file)):
        return Item(name, file, storable(prompt or ""), {}, f"{name}: its name {problem}; rename the file")
    if prompt is None and sidecar.is_file():
        try:
            path_inside(root if root.is_dir() else file.parent, str(sidecar.absolute()), str(sidecar), _COPY)
            prompt = read_text(sidecar).strip()
        except InputError as error:
            return Item(name, file, "", {}, str(error))
    return checked_item(name, file, prompt or "", None, str(sidecar))


def item_of_row(table: Path, file_name: str, prompt: str, row: dict[str, Any], where: str) -> Item:
    """The item of a row that names `file_name`, relative to the table. A file outside the table's folder is the item's
    error."""
    file = table.parent / file_name
    try:
        path_inside(table.parent, file_name, f"{where}: path", FIX)
    except InputError as error:
        return Item(str(file), file, prompt[:MAX_CHARACTERS], {}, str(error))
    return checked_item(str(file), file, prompt, row.get("metadata"), where, row.get("image"), table)


def checked_item(
    name: str, path: Path, prompt: str, metadata: Any, where: str, image: Any = None, table: Path = Path()
) -> Item:
    """`metadata`: a mapping or JSON text, or None. `where`: the source of the prompt, for the item's error. `image`:
    a picture of the prompt, as `picture_file` reads it from a row of `table`, or None."""
    if len(prompt) > MAX_CHARACTERS:
        text = f"{where}: the prompt has {len(prompt):,} characters, the limit is {MAX_CHARACTERS:,}; shorten it"
        return Item(name, path, storable(prompt[:80]), {}, text)
    if problem := bad_text(prompt):
        return Item(name, path, storable(prompt), {}, f"{where}: the prompt {problem}; remove it")
    try:
        kept = read_metadata(metadata, where)
        image = str(picture_file(table, image, f"{where}: image")) if image is not None else None
        kept, files = named_files(kept, table.parent, f"{where}: metadata")
    except InputError as error:
        return Item(name, path, prompt, {}, str(error))
    return Item(name, path, prompt, kept, image=image, files=files)


def _items_of_table(table: Path, prompt: str | None) -> list[Item]:
    names = columns_of(table, _TABLE_COLUMNS)
    if "path" not in names:
        raise InputError(f"{table}: has no column 'path' (columns: {', '.join(names)}); add one with the files")
    items = []
    for number, row in enumerate(read_rows(table, _TABLE_COLUMNS), start=1):
        if row["path"] is None:  # a take whose media was not kept
            continue
        text = prompt if prompt is not None else row.get("prompt") or ""
        if not isinstance(row["path"], str) or not isinstance(text, str):
            raise InputError(f"{table}, row {number}: 'path' and 'prompt' must be text")
        items.append(item_of_row(table, row["path"], text, row, f"{table}, row {number}"))
    if not items:
        raise InputError(f"{table}: lists no files; fill the column 'path'")
    return items


# -------------------------------------------------------------------------------------------------- the scoring


Batch = list[tuple[Item, Media]]
Rows = dict[tuple[str, str, str], dict[str, Any]]  # by path, prompt and reward


def _batches(todo: list[Item], rows: Rows, names: list[str], done: set) -> Iterator[tuple[Batch, int]]:
    """Consecutive files of one shape and frame rate, up to BATCH and BATCH_BYTES, each with the number of unreadable
    files that became error rows since the last batch."""
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
                    _add_row(rows, item, name, None, str(error).replace(str(item.path), item.name))
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
                _add_row(rows, item, name, None, f"{item.name}: {outcome}")
            else:
                _add_row(rows, item, name, float(outcome.values[0]), None)
                done.add((item.name, item.prompt, name))


def _takes(index: int, item: Item, media: Media) -> Takes:
    # Routing of prompts to rewards is for training; here the user chose the rewards by name.
    metadata = {key: value for key, value in item.metadata.items() if key != ROUTING_KEY}
    prompt = PromptItem(index=index, text=item.prompt, image=item.image, metadata=metadata, files=item.files)
    return Takes(media, [prompt], None)


def _add_row(rows: Rows, item: Item, name: str, value: float | None, error: str | None) -> None:
    rows[item.name, item.prompt, name] = {
        "path": item.name,
        "prompt": item.prompt,
        "reward": name,
        "score": value,
        "error": None if error is None else storable(mask(error)),  # a user's reward may raise any text
    }


# ----------------------------------------------------------------------------------------------------- the table


def read_scores(out: Path) -> Rows:
    """Rows of an earlier call; {} when there was none. Raises `InputError`."""
    if not out.exists():
        return {}
    try:
        rows = [ScoreRow.model_validate(row).model_dump() for row in read_rows(out)]
    except (InputError, ValidationError):
        raise InputError(
            f"--out {out}: exists but is not a table of scores; remove it or choose another file"
        ) from None
    return {(row["path"], row["prompt"], row["reward"]): row for row in rows}


def write_scores(out: Path, rows: Rows) -> None:
    import pyarrow

    schema = pyarrow.schema(
        [(name, pyarrow.string()) for name in ("path", "prompt", "reward")]
        + [("score", pyarrow.float64()), ("error", pyarrow.string())]
    )
    write_parquet(out, pyarrow.Table.from_pylist(list(rows.values()), schema=schema))


def print_scores(scored: list[dict[str, Any]], names: list[str], console: Console) -> None:
    """A table of each reward's mean and standard deviation over the rows `scored`."""
    from rich.table import Table

    table = Table()
    for column in ("reward", "files", "mean", "std", "failed"):
        table.add_column(column, justify="left" if column == "reward" else "right", overflow="fold")
    for name in names:
        rows = [row for row in scored if row["reward"] == name]
        values = [row["score"] for row in rows if row["error"] is None]
        mean, std = (f"{np.mean(values):.4f}", f"{np.std(values):.4f}") if values else ("–", "–")
        table.add_row(name, str(len(rows)), mean, std, str(len(rows) - len(values)))
    console.print(table)
