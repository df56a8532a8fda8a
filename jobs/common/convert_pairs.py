"""Preference data of other people as labelled pairs, for `rushes pairs`: read row by row, filtered, written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from jobs.common.pair_embeddings import Dropped
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.files import did_you_mean
from pipeline.core.media_kinds import is_media, media_kind
from pipeline.core.pair_formats import FORMATS
from pipeline.core.pair_formats.base import JudgedPair, LeftOut, PairFormat
from pipeline.core.pair_formats.files import columns_in, format_of, rows_of
from pipeline.core.pair_table import PairTable
from pipeline.core.prompt_diversity import log_distances
from pipeline.core.safe_paths import path_inside

Scores = Mapping[tuple[str, str], float]  # (take, prompt) -> score


@dataclass(frozen=True, kw_only=True, slots=True)
class PairFilter:
    """`scores`: margins are differences of these, for the take that is labelled better. `top`: so many pairs, those of
    the largest margin plus `diversity` times the log distance of their prompt to others, both standardised (FiFA)."""

    ties: bool = True
    min_margin: float | None = None
    top: int | None = None
    diversity: float = 0.0
    scores: Scores | None = None

    @property
    def needs_margin(self) -> bool:
        return self.min_margin is not None or self.top is not None


@dataclass
class Conversion:
    """What `convert` has done."""

    formats: dict[str, str] = field(default_factory=dict)  # file -> format
    rows: int = 0  # pairs that the files hold
    written: int = 0
    ties: int = 0
    prompts: int = 0
    embedded: int = 0  # files copied into the table, because they lie outside its folder
    dropped: Dropped = field(default_factory=Dropped)


def open_formats(files: list[Path], name: str | None, aspect: str | None) -> list[PairFormat]:
    """Of each file. Raises `InputError` for columns of no format, `ConfigError` for names that are none."""
    formats = []
    for file in files:
        columns = columns_in(file)
        found = FORMATS.get(name) if name else format_of(file, columns)
        if missing := sorted(found.required - set(columns)):
            raise InputError(f"{file}: has no column {missing[0]!r}, which --format {found.name} needs "
                             f"(columns: {', '.join(columns[:30])})")  # fmt: skip
        if aspect is not None and aspect not in found.aspects:
            known = ", ".join(found.aspects) or "it has none"
            raise ConfigError(
                f"--aspect: found {aspect!r:.60}{did_you_mean(aspect, found.aspects)}; of {found.name}: {known}"
            )
        formats.append(found(aspect=aspect))
    return formats


def convert(
    files: list[Path], formats: list[PairFormat], media: Path | None, pair_filter: PairFilter, out: Path
) -> Conversion:
    """Reads the files (twice, where pairs are chosen among all) and writes the table. `media`: the folder of the files
    that rows name; None: that of each table. Raises `InputError` where nothing is left."""
    chosen = None
    if pair_filter.top is not None:
        chosen = _choose(
            [_brief(pair) for pair in _pairs(files, formats, media, pair_filter, Conversion())], pair_filter
        )
    done, prompts, home = Conversion(), set(), Path(os.path.abspath(out.parent))
    with PairTable(out) as table:
        for number, pair in enumerate(_pairs(files, formats, media, pair_filter, done)):
            if chosen is not None and number not in chosen:
                done.dropped.add(f"not among the best {pair_filter.top}", pair.where)
                continue
            sides = [_stored(take, home) for take in (pair.a, pair.b)]
            done.embedded += sum(isinstance(new, bytes) and isinstance(old, str)
                                 for new, old in zip(sides, (pair.a, pair.b), strict=True))  # fmt: skip
            table.add(pair.prompt, sides[0], sides[1], pair.label, rater=pair.rater, subset=pair.subset,
                      origin=pair.where.rsplit(", ", 1)[0].rsplit("/", 1)[-1], margin=pair.margin)  # fmt: skip
            done.ties += pair.label == 0
            prompts.add(hashlib.sha256(pair.prompt.encode("utf-8", "surrogatepass")).digest()[:8])
        done.written, done.prompts = table.rows, len(prompts)
        if not table.rows:
            raise InputError(f"no pair is left to write; {'; '.join(done.dropped.lines()) or 'the files hold none'}")
    return done


def _pairs(
    files: list[Path], formats: list[PairFormat], media: Path | None, pair_filter: PairFilter, done: Conversion
) -> Iterator[JudgedPair]:
    """Those that can be used; the sides are bytes or absolute paths."""
    for file, found in zip(files, formats, strict=True):
        done.formats[str(file)] = found.name
        for pair in found.pairs(rows_of(file, found.required | found.optional)):
            done.rows += 1
            result = _located(pair, media or file.parent) if isinstance(pair, JudgedPair) else pair
            if isinstance(result, JudgedPair) and isinstance(pair, JudgedPair):
                result = _filtered(result, pair, file, pair_filter)
            if isinstance(result, LeftOut):
                done.dropped.add(result.reason, f"{result.where}{': ' + result.detail if result.detail else ''}")
            else:
                yield result


def _located(pair: JudgedPair, root: Path) -> JudgedPair | LeftOut:
    sides: list[str | bytes] = []
    for take in (pair.a, pair.b):
        if isinstance(take, bytes):
            if not is_media(take):
                return LeftOut("no picture or clip that is read", pair.where, f"{len(take):,} bytes of another kind")
            sides.append(take)
            continue
        try:
            path = path_inside(root, take, f"{pair.where}: take", "give its folder with --media")
            media_kind(path)
        except InputError as error:
            return LeftOut("a file that is missing or cannot be read", pair.where, str(error))
        sides.append(str(path))
    return replace(pair, a=sides[0], b=sides[1])


def _filtered(pair: JudgedPair, as_named: JudgedPair, file: Path, pair_filter: PairFilter) -> JudgedPair | LeftOut:
    """`as_named`: with the sides as the file names them, by which `rushes agree` has scored it."""
    if pair.label == 0 and (not pair_filter.ties or pair_filter.needs_margin):
        return LeftOut("a tie", pair.where)
    if pair_filter.scores is not None:
        found = [pair_filter.scores.get((scored_name(take, file), pair.prompt)) for take in (as_named.a, as_named.b)]
        if found[0] is None or found[1] is None:
            return LeftOut("no score", pair.where, "run `rushes agree` on the table first")
        pair = replace(pair, margin=pair.label * (found[0] - found[1]))
    if pair_filter.needs_margin and pair.margin is None:
        return LeftOut("no margin", pair.where, "the file states none; give --scores")
    if pair_filter.min_margin is not None and pair.margin is not None and pair.margin < pair_filter.min_margin:
        return LeftOut(f"a margin below {pair_filter.min_margin:g}", pair.where, f"{pair.margin:.4g}")
    return pair


def scored_name(take: str | bytes, table: Path) -> str:
    """What `rushes agree` calls a take of this table in its scores.parquet."""
    return f"sha256:{hashlib.sha256(take).hexdigest()[:24]}" if isinstance(take, bytes) else str(table.parent / take)


def _brief(pair: JudgedPair) -> tuple[str, float]:
    return pair.prompt, pair.margin if pair.margin is not None else 0.0


def _choose(pairs: list[tuple[str, float]], pair_filter: PairFilter) -> set[int]:
    """Positions of the best `top` of (prompt, margin); the earlier one of equals."""
    if not pairs:
        return set()
    value = _standardised(np.array([margin for _, margin in pairs]))
    if pair_filter.diversity:
        prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in pairs))}
        distance = log_distances(list(prompts))[[prompts[prompt] for prompt, _ in pairs]]
        value = value + pair_filter.diversity * _standardised(distance)
    return set(np.argsort(-value, kind="stable")[: pair_filter.top].tolist())


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-12)


def _stored(take: str | bytes, home: Path) -> str | bytes:
    """A path relative to the table where the file lies in its folder or below, else the file's bytes."""
    if isinstance(take, bytes):
        return take
    path = Path(os.path.abspath(take))
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else path.read_bytes()
