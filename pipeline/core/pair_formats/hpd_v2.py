"""Human Preference Dataset v2 (arXiv 2306.09341): pairs to train on, ranks of several pictures to test with."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.core.pair_formats.base import JudgedPair, LeftOut, PairFormat, Row, ranked, register


@register("hpd-v2-train")
class HPDv2Train(PairFormat):
    """HPDv2's train.json: file_path and human_preference (1 for the preferred one of two), prompt."""

    required = frozenset({"human_preference", "file_path", "prompt"})
    checked = "the data set's card"

    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]:
        for where, row in rows:
            yield from ranked(where, row["prompt"], row["file_path"], row["human_preference"])


@register("hpd-v2-test")
class HPDv2Test(PairFormat):
    """HPDv2's test.json: image_path and rank (of the picture at the same place, 0 or 1 is the best), prompt."""

    required = frozenset({"image_path", "rank", "prompt"})
    checked = "the data set's card"

    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]:
        for where, row in rows:
            if not isinstance(row["rank"], list) or not isinstance(row["image_path"], list):
                yield LeftOut("no list of pictures and ranks", where)
                continue
            ranks = [-rank if isinstance(rank, int | float) else rank for rank in row["rank"]]
            yield from ranked(where, row["prompt"], row["image_path"], ranks)
