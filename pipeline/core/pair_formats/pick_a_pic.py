"""Pick-a-Pic (arXiv 2305.01569), v1 and v2: choices of a public web app's users."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.core.pair_formats.base import JudgedPair, LeftOut, PairFormat, Row, pair_of, register, text


@register("pick-a-pic")
class PickAPic(PairFormat):
    """Pick-a-Pic: jpg_0, jpg_1 (bytes), label_0 (1, 0 or 0.5 for a tie), caption, user_id."""

    required = frozenset({"jpg_0", "jpg_1", "label_0", "caption"})
    optional = frozenset({"user_id", "has_label"})
    checked = "the data set's card"

    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]:
        labels = {1.0: 1, 0.0: -1, 0.5: 0}
        for where, row in rows:
            if row.get("has_label") is False or row["label_0"] not in labels:
                yield LeftOut("no label", where)
                continue
            label = labels[row["label_0"]]
            yield pair_of(where, row["caption"], row["jpg_0"], row["jpg_1"], label, rater=text(row.get("user_id")))
