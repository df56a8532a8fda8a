"""`rushes score`: scores images and videos with any rewards, to parquet: one row per file and reward.

Columns: path, prompt, reward, score, error. A file that cannot be read, or a reward that fails on it, is a row with an
error and no score. Rows with a score are not computed again; rows with an error are tried again. Nothing is lost when
it is stopped: what is done is written every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import preflight
from pipeline.config import RewardConfig
from pipeline.errors import ConfigError, InputError, RewardError, RushesError
from pipeline.files import atomic_write, describe_os_error
from pipeline.media import list_media, read_media
from pipeline.prompts import MAX_CHARACTERS
from pipeline.rewards.loader import RewardRunner, build_scorer
from pipeline.types import Media, PromptItem

if TYPE_CHECKING:
    from rich.console import Console

SAVE_EVERY_S = 5.0
BATCH = 16


@dataclass(frozen=True)
class Item:
    """One file to score; `name` is what goes into the column `path`."""

    name: str
    path: Path
    prompt: str
    metadata: dict[str, Any]


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
    preflight.check_writable(out.parent, "--out")
    runners = {name: build_scorer(name, cfg) for name, cfg in zip(names, rewards, strict=True)}
    done = {(row["path"], row["reward"]) for row in rows.values() if row["error"] is None}
    todo = [item for item in items if any((item.name, name) not in done for name in names)]
    skipped = len(items) - len(todo)

    from rich.progress import Progress

    last_save = time.monotonic()
    try:
        with Progress(console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("scoring", total=len(todo))
            for batch in _batches(todo, rows, names, done):
                _score_batch(batch, runners, rows, done)
                progress.advance(bar, sum(1 for _ in batch))
                if time.monotonic() - last_save > SAVE_EVERY_S:
                    write_scores(out, rows)
                    last_save = time.monotonic()
    finally:
        write_scores(out, rows)

    wanted = [rows[item.name, name] for item in items for name in names]
    failed = [row for row in wanted if row["error"] is not None]
    _print(wanted, names, console, skipped)
    console.print(f"written to {out}", soft_wrap=True, highlight=False)
    if failed:
        raise RushesError(
            f"{len(failed)} of {len(wanted)} scores failed, the first: {failed[0]['error']}; "
            f"the others are in the column 'error' of {out}; mend the files and run the same command again"
        )
    return 0


# ------------------------------------------------------------------------------------------------- what to score


def find_items(path: Path, prompt: str | None) -> list[Item]:
    """Files of a folder, one file, or the rows of a parquet with `path` (and `prompt`, `metadata`). `InputError`s."""
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
            raise InputError(f"{sidecar}: is not UTF-8 text; save the file as UTF-8") from None
        except OSError as error:
            raise InputError(f"cannot read {describe_os_error(error, sidecar)}") from None
    return Item(str(file), file, _checked(prompt or "", str(sidecar)), {})


def _checked(prompt: str, where: str) -> str:
    if len(prompt) > MAX_CHARACTERS:
        raise InputError(
            f"{where}: the prompt has {len(prompt):,} characters, the limit is {MAX_CHARACTERS:,}; shorten it"
        )
    return prompt


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
        metadata = row.get("metadata") if isinstance(row.get("metadata"), dict) else {}
        file = table.parent / row["path"]
        items.append(Item(str(file), file, _checked(text, f"{table}, row {number}"), metadata))
    if not items:
        raise InputError(f"{table}: lists no files; fill the column 'path'")
    return items


# -------------------------------------------------------------------------------------------------- the scoring


Batch = list[tuple[Item, Media]]
Rows = dict[tuple[str, str], dict[str, Any]]


def _batches(todo: list[Item], rows: Rows, names: list[str], done: set) -> Iterator[Batch]:
    """Consecutive files of one shape and rate, up to BATCH; unreadable files become error rows on the way."""
    batch: Batch = []
    for item in todo:
        try:
            media = read_media(item.path)
        except RushesError as error:
            for name in names:
                if (item.name, name) not in done:
                    _put(rows, item, name, None, str(error))
            continue
        if batch and (len(batch) == BATCH or _shape(batch[-1][1]) != _shape(media)):
            yield batch
            batch = []
        batch.append((item, media))
    if batch:
        yield batch


def _shape(media: Media) -> tuple:
    return (*media.frames.shape[1:], media.fps)


def _score_batch(batch: Batch, runners: dict[str, RewardRunner], rows: Rows, done: set) -> None:
    for name, runner in runners.items():
        part = [entry for entry in batch if (entry[0].name, name) not in done]
        if not part:
            continue
        try:
            values: list[float | None] = list(_run(runner, part))
        except RewardError:
            values = [None] * len(part)  # find out which one it is: one bad file must not fail the others
        for (item, media), value in zip(part, values, strict=True):
            error = None
            if value is None:
                try:
                    value = _run(runner, [(item, media)])[0]
                except RewardError as failure:
                    error = f"{item.name}: {failure}"
            _put(rows, item, name, value, error)
            if error is None:
                done.add((item.name, name))


def _run(runner: RewardRunner, part: Batch) -> list[float]:
    prompts = [PromptItem(index=i, text=item.prompt, metadata=item.metadata) for i, (item, _) in enumerate(part)]
    media = Media(frames=np.concatenate([m.frames for _, m in part]), fps=part[0][1].fps)
    return [float(v) for v in runner.run(media, prompts, None).values]


def _put(rows: Rows, item: Item, name: str, value: float | None, error: str | None) -> None:
    rows[item.name, name] = {
        "path": item.name,
        "prompt": item.prompt,
        "reward": name,
        "score": value,
        "error": error,
    }


# ----------------------------------------------------------------------------------------------------- the table


def read_scores(out: Path) -> Rows:
    """Rows of an earlier call, by (path, reward); {} when there is none. Raises `InputError`."""
    import pyarrow
    import pyarrow.parquet

    if not out.exists():
        return {}
    try:
        rows = pyarrow.parquet.read_table(out).to_pylist()
        return {
            (row["path"], row["reward"]): {k: row[k] for k in ("path", "prompt", "reward", "score", "error")}
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
