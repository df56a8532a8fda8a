"""What a format of preference data is: which columns it is known by, and how its rows become judged pairs.

A format sees rows as mappings, in order and one at a time, and yields `JudgedPair` or, for what cannot be used,
`LeftOut`. It opens no file: a side is a picture's bytes or a name, which whoever reads the pairs looks up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

from pipeline.core.reading import shown
from pipeline.core.registry import Registry

Row = tuple[str, dict[str, Any]]  # where it stands, for messages; its values by column
TIE_WORDS = ("tie", "same", "equal")


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedPair:
    """`label`: +1 a is better, -1 b, 0 a tie. `margin`: by how much, where the file says; negative
    where the scores that it was taken from contradict the label."""

    where: str
    prompt: str
    a: str | bytes
    b: str | bytes
    label: int
    rater: str | None = None
    subset: str | None = None
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What was dropped. `reason` is one of few, for counting; `where` and `detail` tell the first from the others."""

    reason: str
    where: str
    detail: str = ""


@dataclass(frozen=True)
class PairFormat(ABC):
    """Subclasses are registered with `@register("name")`; the first line of their docstring says whose data it is."""

    name: ClassVar[str]
    required: ClassVar[frozenset[str]]  # columns it is known by
    optional: ClassVar[frozenset[str]] = frozenset()  # others that it reads
    checked: ClassVar[str] = "its documentation"  # what the columns were compared with
    aspects: ClassVar[tuple[str, ...]] = ()  # of which one is the label; the first by default

    aspect: str | None = field(default=None)

    @abstractmethod
    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]: ...


FORMATS: Registry[type[PairFormat]] = Registry("--format", "pipeline.core.pair_formats")
register = FORMATS.register


def side(value: Any) -> str | bytes | None:
    """A picture or clip as data sets hold it: bytes, a name, or the struct of the `datasets` library. None: neither."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, str | bytes) and value else None


def pair_of(
    where: str, prompt: Any, a: Any, b: Any, label: int, margin: float | None = None, **more: Any
) -> JudgedPair | LeftOut:
    """Checks a row's values."""
    if not isinstance(prompt, str) or not prompt.strip():
        return LeftOut("no prompt", where, f"found {shown(prompt)}")
    first, second = side(a), side(b)
    if first is None or second is None:
        return LeftOut("no picture", where, f"found {shown(a)} and {shown(b)}")
    if first == second:
        return LeftOut("twice the same take", where)
    if any(name.startswith(("http://", "https://")) for name in (first, second) if isinstance(name, str)):
        return LeftOut("an address in place of a file", where, "download it first; nothing is fetched here")
    return JudgedPair(where=where, prompt=prompt, a=first, b=second, label=label, margin=margin, **more)


def ranked(
    where: str, prompt: Any, takes: Sequence[Any], scores: Sequence[Any], **more: Any
) -> Iterator[JudgedPair | LeftOut]:
    """All pairs of the takes of one prompt; a higher score is better, and equal ones are a tie."""
    if len(takes) != len(scores) or len(takes) < 2:
        yield LeftOut("not as many scores as takes, or fewer than two", where, f"{len(takes)} and {len(scores)}")
        return
    if not all(isinstance(score, int | float) and score == score for score in scores):
        yield LeftOut("no number as rank or score", where, shown(next((s for s in scores if s != s or s is None), "")))
        return
    for i, j in combinations(range(len(takes)), 2):
        label = (scores[i] > scores[j]) - (scores[i] < scores[j])
        yield pair_of(where, prompt, takes[i], takes[j], label, abs(float(scores[i] - scores[j])), **more)


def in_groups(rows: Iterator[Row], column: str) -> Iterator[list[Row]]:
    """Consecutive rows with the same value in a column."""
    group: list[Row] = []
    for row in rows:
        if group and group[-1][1].get(column) != row[1].get(column):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def text(value: Any) -> str | None:
    """Of an id or user, which are often numbers."""
    return None if value is None or value == "" else str(value)
