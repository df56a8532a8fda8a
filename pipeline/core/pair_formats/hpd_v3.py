"""Human Preference Dataset v3 (arXiv 2508.03789): pairs whose first picture is the preferred one."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.core.pair_formats.base import JudgedPair, LeftOut, PairFormat, Row, pair_of, register


@register("hpd-v3")
class HPDv3(PairFormat):
    """HPDv3: path1 (preferred), path2, prompt, confidence (the margin)."""

    required = frozenset({"path1", "path2", "prompt"})
    optional = frozenset({"confidence"})
    checked = "other programs that read it"

    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]:
        for where, row in rows:
            sure = row.get("confidence")
            margin = float(sure) if isinstance(sure, int | float) else None
            yield pair_of(where, row["prompt"], row["path1"], row["path2"], 1, margin)
