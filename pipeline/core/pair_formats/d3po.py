"""D3PO's labels (arXiv 2311.13231): a list of numbers a prompt, in the order in which its script has saved pictures."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.core.pair_formats.base import JudgedPair, LeftOut, PairFormat, Row, ranked, register


@register("d3po")
class D3PO(PairFormat):
    """D3PO's JSON: [[1, 0, -1, …], …], a row a prompt of prompt.json beside it; pictures are images/00000.png on."""

    required = frozenset({"labels", "prompt", "row"})  # how a JSON list of lists of numbers is read
    checked = "the authors' scripts"

    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]:
        for where, row in rows:
            count = len(row["labels"])
            names = [f"images/{count * row['row'] + number:05d}.png" for number in range(count)]
            yield from ranked(where, row["prompt"], names, row["labels"])
