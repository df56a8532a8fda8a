"""Prompt sets: .txt (one per line, verbatim; blank lines are skipped), .jsonl, .parquet, a table of labelled pairs or a
folder of captioned clips, and the cursor over them.

Columns of .jsonl and .parquet: `prompt` (required), `negative`, `image` (path, relative to the file, or an image of
the `datasets` library), `clip` (path of a clip or picture that the prompt describes), `metadata` (a mapping handed to
the scorers, or JSON text of one; in parquet also a struct or a map). The rows of GenEval's own file are read as they
are. Files that a row names lie in the file's own folder or below it. Everything wrong with a row is an `InputError`
that names file and line (parquet: row, from 1). Folders: `pipeline.core.captioned_clips`; pairs:
`pipeline.core.labelled_pairs`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.code_names import pipeline_names
from pipeline.core.errors import CheckpointError, InputError, one_line
from pipeline.core.files import did_you_mean
from pipeline.core.labelled_pairs import is_labelled, pair_rows
from pipeline.core.named_files import named_file, named_files, picture_file
from pipeline.core.parquet import columns_of, read_rows
from pipeline.core.reading import (
    bad_text,
    check_plain,
    parse_json,
    parse_json_object,
    read_json_object,
    shown,
    text_lines,
)
from pipeline.core.types import GivenTake, PromptItem

MAX_CHARACTERS = 4000
COLUMNS = ("prompt", "negative", "image", "metadata", "clip")
GENEVAL_KEYS = ("tag", "include", "exclude")
_AGAIN = "copy the checkpoint again"
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True, slots=True)
class _Row:
    """One prompt of a file, unchecked. `where`: 'line 3' or 'row 3'."""

    where: str
    columns: dict[str, Any]
    takes: tuple[GivenTake, ...] = ()


def load_prompts(path: Path) -> list[PromptItem]:
    """All prompts of a file, in order. Raises `InputError`."""
    path = Path(path)
    return [_item(path, row, index) for index, row in enumerate(_checked_rows(path))]


def prompt_locations(path: Path) -> list[str]:
    """'line 3' / 'row 3' of each prompt of a file, by `PromptItem.index`."""
    return [row.where for row in _checked_rows(Path(path))]


def _checked_rows(path: Path) -> list[_Row]:
    if path.is_dir():
        return _folder_rows(path)
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: prompts must be {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, found "
            f"{path.suffix or 'no suffix'!r}"
        )
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such prompts file{did_you_mean(path.name, siblings) or '; check the path'}")
    rows = list(_parquet_rows(path) if path.suffix == ".parquet" else _text_rows(path))
    if not rows:
        raise InputError(f"{path}: holds no prompts; put one in each {'row' if path.suffix == '.parquet' else 'line'}")
    return rows


def _folder_rows(folder: Path) -> list[_Row]:
    from pipeline.core.captioned_clips import captioned_files  # reads media

    rows = [_Row(where, columns) for where, columns in captioned_files(folder)]
    if not rows:
        raise InputError(
            f"{folder}: its takes have no files; keep them (tracking.save_takes_every), or give other clips"
        )
    return rows


def _text_rows(path: Path) -> Iterator[_Row]:
    for number, line in text_lines(path):
        where = f"line {number}"
        if not line.strip():
            continue
        if path.suffix == ".txt":
            yield _Row(where, {"prompt": line})
            continue
        columns = parse_json_object(line, f"{path}, {where}", 'write one object a line, such as {"prompt": "…"}')
        yield _Row(where, _with_geneval(columns))


def _parquet_rows(path: Path) -> Iterator[_Row]:
    names = columns_of(path, COLUMNS)
    if is_labelled(names):
        yield from (_Row(*row) for row in pair_rows(path))
        return
    if "prompt" not in names:
        raise InputError(f"{path}: has no column 'prompt' (columns: {', '.join(names) or 'none'}); rename one")
    for name in names:
        _check_key(name, names, f"{path}, row 1")
    for number, columns in enumerate(read_rows(path, names), start=1):
        yield _Row(f"row {number}", _with_geneval(columns))


def _with_geneval(columns: dict[str, Any]) -> dict[str, Any]:
    """A row of GenEval's own file has its task beside the prompt; the scorer reads it from the metadata."""
    if "metadata" in columns or "include" not in columns:
        return columns
    task = {key: columns[key] for key in GENEVAL_KEYS if key in columns}
    return {**{key: value for key, value in columns.items() if key not in GENEVAL_KEYS}, "metadata": task}


def _check_key(key: str, keys: Collection[str], place: str) -> None:
    if key in COLUMNS or (key in GENEVAL_KEYS and "include" in keys and "metadata" not in keys):
        return
    hint = did_you_mean(key, COLUMNS) or "; put what scorers need into 'metadata'"
    raise InputError(f"{place}: unknown key {shown(key)}{hint} (keys: {', '.join(COLUMNS)})")


def read_metadata(metadata: Any, where: str) -> dict[str, Any]:
    """The metadata of a row: a mapping, a parquet map, or JSON text of one; {} for None. Raises `InputError`."""
    fix = 'write a mapping, such as {"objects": 2}'
    if isinstance(metadata, str):
        metadata = parse_json(metadata, f"{where}: metadata", fix)
    try:
        if isinstance(metadata, list):  # a parquet map
            metadata = dict(metadata)
        check_plain(metadata)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: metadata {one_line(error, 120)}; {fix}") from None
    if metadata is not None and not isinstance(metadata, dict):
        raise InputError(f"{where}: 'metadata' must be a mapping, found {shown(metadata)}")
    return {key: value for key, value in (metadata or {}).items() if value is not None}  # parquet fills absent fields


def _item(path: Path, row: _Row, index: int) -> PromptItem:
    place = f"{path}, {row.where}"
    for key in row.columns:
        _check_key(key, row.columns, place)
    if "prompt" not in row.columns:
        raise InputError(f"{place}: the key 'prompt' is missing")
    text, negative, image, metadata, clip = (row.columns.get(key) for key in COLUMNS)
    if not isinstance(text, str):
        raise InputError(f"{place}: 'prompt' must be text, found {shown(text)}")
    if not text.strip():
        raise InputError(f"{place}: the prompt is empty; write one or remove the {row.where.split()[0]}")
    for name, value in (("prompt", text), ("negative", negative)):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{place}: {name!r} must be text, found {shown(value)}")
        if value is not None and len(value) > MAX_CHARACTERS:
            raise InputError(
                f"{place}: the {name} has {len(value):,} characters, the limit is {MAX_CHARACTERS:,}; "
                "text encoders would cut it silently, so shorten it"
            )
        problem = value is not None and ("holds a NUL character" if "\x00" in value else bad_text(value))
        if problem:
            raise InputError(f"{place}: the {name} {problem}; remove it")
    if image is not None:
        image = str(picture_file(path, image, f"{place}: image"))
    if clip is not None:
        clip = str(named_file(path if path.is_dir() else path.parent, clip, f"{place}: clip"))
    metadata, files = named_files(read_metadata(metadata, place), path.parent, f"{place}: metadata")
    return PromptItem(
        index=index, text=text, negative=negative, image=image, clip=clip, metadata=metadata, files=files,
        takes=row.takes,
    )  # fmt: skip


# -------------------------------------------------------------------------------------- what the text encoders read


def check_prompt_lengths(
    prompts: Sequence[PromptItem], pretrained: str, call_kwargs: dict[str, Any], path: Path | None = None
) -> None:
    """Refuses prompts that every tokenizer of a local checkpoint would truncate. Raises `InputError`.

    With several encoders (SD3: CLIP 77 tokens, T5 256) it is enough that one of them reads the whole prompt. Hub ids
    and checkpoints without a fast tokenizer (tokenizer.json) are not checked.
    """
    tokenizers = _tokenizers(Path(pretrained), call_kwargs)
    if not tokenizers:
        return
    for prompt in prompts:
        for kind, text in (("prompt", prompt.text), ("negative prompt", prompt.negative)):
            if not text:
                continue
            if any(tokenizer.count(text) <= tokenizer.limit for tokenizer in tokenizers):
                continue
            longest = max(tokenizers, key=lambda tokenizer: tokenizer.limit)
            where = (
                f"{path}, {prompt_locations(path)[prompt.index]}" if path is not None else f"prompt {prompt.index + 1}"
            )
            raise InputError(
                f"{where}: the {kind} {text[:40]!r}… has {longest.count(text)} tokens, the text encoder of "
                f"{pretrained} reads {longest.limit} "
                "and would cut the rest silently; shorten it or raise generator.call_kwargs.max_sequence_length"
            )


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """A fast tokenizer, and how many tokens its text encoder reads."""

    tokenizer: Any
    limit: int

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids)


def _tokenizers(folder: Path, call_kwargs: dict[str, Any]) -> list[_Tokenizer]:
    """Of each tokenizer folder of a checkpoint whose limit is known."""
    limited = []
    for sub in sorted(folder.glob("tokenizer*")):
        file = sub / "tokenizer.json"
        if not file.is_file():
            continue
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
            settings_file = sub / "tokenizer_config.json"
            settings = (
                read_json_object(settings_file, "copy the checkpoint again", lenient=True)
                if settings_file.exists()
                else {}
            )
        except InputError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InputError(
                f"{file}: is not a readable tokenizer ({one_line(error, 160)}); copy the checkpoint again"
            ) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        model_max = settings.get("model_max_length")
        limit = int(model_max) if isinstance(model_max, int | float) and model_max < 1_000_000 else None
        length = call_kwargs.get("max_sequence_length")
        if length is None and not _is_clip(settings):
            length = _default_sequence_length(folder)
        if length is not None and not (_is_clip(settings) and limit is not None):
            limit = int(length) if limit is None else min(limit, int(length))
        if limit is not None:
            limited.append(_Tokenizer(tokenizer, limit))
    return limited


def _is_clip(settings: dict[str, Any]) -> bool:
    """CLIP encoders always read model_max_length tokens; max_sequence_length is for encoders such as T5."""
    return "CLIP" in str(settings.get("tokenizer_class", ""))


def _default_sequence_length(folder: Path) -> int | None:
    """Default of `max_sequence_length` in the pipeline's `__call__`; None if it has no such argument."""
    try:
        name = read_json_object(folder / "model_index.json", "copy the checkpoint again", lenient=True)["_class_name"]
        import diffusers

        if name not in pipeline_names():
            return None
        default = inspect.signature(getattr(diffusers, name).__call__).parameters["max_sequence_length"].default
    except (InputError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return default if isinstance(default, int) else None


# --------------------------------------------------------------------------------------------------- the cursor


def content_digest(prompts: Sequence[PromptItem]) -> str:
    """Of texts, pictures, clips and labels, in order: equal for the same prompts under another path or in another
    format."""
    digest = hashlib.sha256()
    file_digests: dict[str | None, str] = {None: ""}
    for prompt in prompts:
        for name in (prompt.image, prompt.clip, *(take.path for take in prompt.takes)):
            if name not in file_digests:
                file_digests[name] = _file_digest(Path(str(name)))
        clip = f"\x00{file_digests[prompt.clip]}" if prompt.clip is not None else ""
        clip += "".join(f"\x00{file_digests[take.path]} {take.label}" for take in prompt.takes)
        digest.update(f"{prompt.text}\x00{prompt.negative or ''}\x00{file_digests[prompt.image]}{clip}\n".encode())
    return digest.hexdigest()[:16]


def _file_digest(path: Path) -> str:
    """Of the size and the first MiB: a set may have thousands of files on a slow disk."""
    try:
        with open(path, "rb") as file:
            head = file.read(2**20)
        return f"{path.stat().st_size} {hashlib.sha256(head).hexdigest()}"
    except OSError:
        return "unreadable"


def _digest_by_path(prompts: Sequence[PromptItem]) -> str:
    """What older checkpoints hold: pictures by their paths."""
    text = "\n".join(f"{p.text}\x00{p.negative or ''}\x00{p.image or ''}" for p in prompts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class PromptCursor:
    """Endless iteration over a prompt set: each epoch is a permutation drawn from (seed, epoch) with PCG64.

    `state()` after n calls of `next()` and `load_state` of it continue with prompt n + 1 exactly.
    """

    def __init__(self, prompts: Sequence[PromptItem], seed: int) -> None:
        if not prompts:
            raise InputError("the prompt set is empty")
        self._prompts = list(prompts)
        self._seed = int(seed)
        self._epoch, self._position = 0, 0
        self._order = self._permutation(0)
        self._digest = content_digest(self._prompts)

    def next(self) -> PromptItem:
        if self._position == len(self._prompts):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._permutation(self._epoch)
        self._position += 1
        return self._prompts[self._order[self._position - 1]]

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "prompts": self._digest,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises `CheckpointError` when the state belongs to another prompt set or order."""
        if state.get("prompts") not in (self._digest, _digest_by_path(self._prompts)):
            raise CheckpointError(
                "the training prompts changed since the checkpoint; restore the file or start a new run"
            )
        if state["seed"] != self._seed:
            raise CheckpointError("run.seed changed since the checkpoint; restore it or start a new run")
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._permutation(self._epoch)

    def _permutation(self, epoch: int) -> list[int]:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch])))
        return rng.permutation(len(self._prompts)).tolist()
