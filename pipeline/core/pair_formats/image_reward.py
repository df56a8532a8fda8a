"""ImageRewardDB (arXiv 2304.05977): a row a picture, the pictures of a prompt ranked from 1, the best."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.core.pair_formats.base import JudgedPair, LeftOut, PairFormat, Row, in_groups, ranked, register


@register("image-reward")
class ImageReward(PairFormat):
    """ImageRewardDB: image (or image_path), prompt_id, prompt, rank (1: best); a prompt's pictures stand together."""

    required = frozenset({"prompt_id", "prompt", "rank", "image_amount_in_total"})
    optional = frozenset({"image", "image_path"})
    checked = "the data set's loading script"

    def pairs(self, rows: Iterator[Row]) -> Iterator[JudgedPair | LeftOut]:
        for group in in_groups(rows, "prompt_id"):
            where, first = group[0]
            if isinstance(first["rank"], list):  # the configurations that hold a prompt in a row
                for place, row in group:
                    ranks = [-rank if isinstance(rank, int) else rank for rank in row["rank"]]
                    yield from ranked(place, row["prompt"], row.get("image") or row.get("image_path") or [], ranks)
                continue
            takes = [row.get("image") or row.get("image_path") for _, row in group]
            ranks = [-row["rank"] if isinstance(row["rank"], int | float) else None for _, row in group]
            yield from ranked(where, first["prompt"], takes, ranks)
