"""Rushes' own tables: scored takes of runs, and labelled pairs, to join and to filter."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.core.labelled_pairs import LABELS
from pipeline.core.pair_formats.base import JudgedPair, LeftOut, PairFormat, Row, pair_of, ranked, register, text


@register("takes")
class Takes(PairFormat):
    """takes.parquet of a run: the kept takes of each prompt, compared by their reward."""

    required = frozenset({"path", "prompt", "prompt_index", "seed", "reward"})
    checked = "tables that Rushes writes"

    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]:
        groups: dict[tuple[int, str], list[Row]] = {}  # a run's takes of a prompt are spread over its table
        for where, row in rows:
            if row["path"] is None or row["reward"] is None:
                yield LeftOut("no media or no reward was kept", where)
            else:
                groups.setdefault((row["prompt_index"], row["prompt"]), []).append((where, row))
        for (_, prompt), group in groups.items():
            takes, rewards = [row["path"] for _, row in group], [row["reward"] for _, row in group]
            yield from ranked(group[0][0], prompt, takes, rewards)


@register("labelled")
class Labelled(PairFormat):
    """The labelled form: path_a, path_b or bytes_a, bytes_b, label (a, b or tie), prompt."""

    required = frozenset({"label", "prompt"})
    optional = frozenset({"path_a", "path_b", "bytes_a", "bytes_b", "rater", "subset", "margin", "repeat_of"})
    checked = "tables that Rushes writes"

    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]:
        for where, row in rows:
            word = str(row["label"]).strip().lower()
            if word not in LABELS:
                yield LeftOut("no label", where)
            elif row.get("repeat_of"):
                yield LeftOut("a repeat of an earlier answer", where)
            else:
                a, b = (row.get(f"bytes_{name}") or row.get(f"path_{name}") for name in "ab")
                more = {"rater": text(row.get("rater")), "subset": text(row.get("subset"))}
                yield pair_of(where, row["prompt"], a, b, LABELS[word], row.get("margin"), **more)
