"""Which takes of a folder a person compares (`rushes label`): the takes that lie there, and pairs of one prompt."""

from __future__ import annotations

import hashlib
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.common.score_files import find_items
from pipeline.core.errors import InputError
from pipeline.core.parquet import read_rows
from pipeline.core.reading import bad_text, shown, storable
from pipeline.core.safe_paths import file_inside
from pipeline.core.takes_table import TAKES_FILE

_COPY_IT = "takes lie in the folder of their table: copy the file there"


@dataclass(frozen=True, slots=True)
class Take:
    """`name`: its path relative to the table of labels."""

    name: str
    path: Path
    prompt: str


@dataclass(frozen=True, slots=True)
class TakePair:
    a: Take
    b: Take

    @property
    def key(self) -> str:
        return pair_key(self.a.prompt, self.a.name, self.b.name)


def pair_key(prompt: str, name: str, other: str) -> str:
    """The same for both orders of the two takes; safe in a URL."""
    text = "\0".join((prompt, *sorted((name, other))))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def find_takes(root: Path, base: Path) -> tuple[list[Take], list[str]]:
    """The takes below `root`, and one line for each that cannot be used: those listed by takes.parquet files, as runs
    and `rushes generate` write them, or, without such a file, all media files with the prompt of NAME.txt.

    `base`: the folder that holds `root` and the table of labels. Raises `InputError` for a folder without takes.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a run's folder, or one with pictures or clips")
    takes: dict[Path, Take] = {}
    problems: list[str] = []
    home = Path(os.path.abspath(base))
    for folder, name, prompt, where in _listed(root, problems):
        try:
            path = file_inside(folder, name, where, _COPY_IT)
            file_inside(root, str(path.absolute()), where, _COPY_IT)
        except InputError as error:
            problems.append(str(error))
            continue
        if problem := bad_text(str(path)):
            problems.append(f"{where}: the name {storable(path.name)} {problem}; rename the file")
            continue
        path = Path(os.path.abspath(path))
        takes.setdefault(path, Take(path.relative_to(home).as_posix(), path, prompt))
    return list(takes.values()), problems


def _listed(root: Path, problems: list[str]) -> Iterator[tuple[Path, str, str, str]]:
    """(folder, name in it, prompt, where that is written) of each take."""
    tables = sorted(root.rglob(TAKES_FILE))
    if not tables:
        for item in find_items(root, None):
            if item.error is not None:
                problems.append(item.error)
            else:
                yield root, str(item.path.absolute()), item.prompt, str(root)
    for table in tables:
        try:
            file_inside(root, str(table.absolute()), str(root), _COPY_IT)
            rows = list(read_rows(table, ("path", "prompt")))
        except InputError as error:
            problems.append(str(error))
            continue
        for number, row in enumerate(rows, start=1):
            where, prompt = f"{table}, row {number}", row.get("prompt") or ""
            if row.get("path") is None:  # a take whose media was not kept
                continue
            if not isinstance(prompt, str):
                problems.append(f"{where}: prompt must be text, found {shown(prompt)}")
            else:
                yield table.parent, row["path"], prompt, f"{where}: path"


def draw_pairs(takes: Sequence[Take], count: int, first: Iterable[TakePair] = ()) -> list[TakePair]:
    """`first` (pairs that have answers), and others up to `count` in all: prompts in turn, and of each prompt all takes
    equally often. The same takes give the same pairs; which of the two is `a` is drawn."""
    chosen = {pair.key: pair for pair in first}
    by_prompt: dict[str, list[Take]] = defaultdict(list)
    for take in sorted(takes, key=lambda take: take.name):
        by_prompt[take.prompt].append(take)
    prompts = sorted(by_prompt)
    random.Random(0).shuffle(prompts)
    sources = [_pairs_of(by_prompt[prompt]) for prompt in prompts]
    while sources and len(chosen) < count:
        for source in list(sources):
            pair = next((pair for pair in source if pair.key not in chosen), None)
            if pair is None:
                sources.remove(source)
            elif len(chosen) < count:
                chosen[pair.key] = pair
    return list(chosen.values())


def _pairs_of(takes: list[Take]) -> Iterator[TakePair]:
    """All pairs of one prompt, those of a half circle twice. Each round holds every take twice."""
    drawing = random.Random(takes[0].prompt)
    takes = list(takes)
    drawing.shuffle(takes)
    count = len(takes)
    for offset in range(1, count // 2 + 1):
        for index in range(count):
            pair = [takes[index], takes[(index + offset) % count]]
            drawing.shuffle(pair)
            yield TakePair(*pair)
