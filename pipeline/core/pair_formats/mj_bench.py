"""MJ-Bench (arXiv 2407.04842): pairs of pictures by subset, for `rushes agree --by subset`."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.core.pair_formats.base import JudgedPair, LeftOut, PairFormat, Row, pair_of, register


@register("mj-bench")
class MJBench(PairFormat):
    """MJ-Bench: image0, image1, label (which is better: 0 or 1), caption, category, subcategory."""

    required = frozenset({"image0", "image1", "label", "caption"})
    optional = frozenset({"category", "subcategory"})
    checked = "the data set's card"

    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]:
        for where, row in rows:
            if row["label"] not in (0, 1, "0", "1"):
                yield LeftOut("no label", where)
                continue
            subset = "/".join(str(row[name]) for name in ("category", "subcategory") if row.get(name))
            label = 1 - 2 * int(row["label"])
            yield pair_of(where, row["caption"], row["image0"], row["image1"], label, subset=subset or None)
